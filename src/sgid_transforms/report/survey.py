"""What is in the stores, measured: the figures behind the HTML report, and for any script."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report._reading import Originals, Reader
from sgid_transforms.report._scoring import Scored, half_cmmd, score_rows, summarize
from sgid_transforms.report.facts import Survey
from sgid_transforms.report.metrics import Scorer
from sgid_transforms.variants.store import VariantStore

_CHUNK = 16  # originals that are in memory at a time, with their variants


def survey(
    captions: CaptionStore,
    variants: VariantStore,
    recipe: Recipe,
    *,
    originals: Originals | None = None,
    scorer: Scorer | None = None,
    class_names: Sequence[str] | None = None,
    max_originals: int = 2000,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Survey:
    """Measure the variants of one recipe.

    Args:
        captions: labels, captions and paths of the originals.
        variants: the variants.
        recipe: whose variants.
        originals: the folder that relative paths of the records start from (default: the working folder), or a function
            that gives the image of a record, or ``None``, for data sets without files.
        scorer: an image-text model such as ``CLIPScorer``; without one, only what was measured at generation is known.
        class_names: what the scorer chooses among; default: all labels of the caption store.
        max_originals: a larger store is sampled: those whose keys have the lowest hashes, so that it is the same sample
            every time.
        progress: wraps the keys while they are walked through, as ``tqdm`` does.

    Raises:
        ValueError: ``max_originals`` is below 1.
        StoreError: a store cannot be read.
    """
    if max_originals < 1:
        raise ValueError(f"max_originals is {max_originals}; it must be at least 1")
    reader = Reader(captions, variants, recipe, originals)
    names = reader.names()
    keys = sorted(names, key=lambda key: hashlib.sha256(key.encode()).digest())[:max_originals]
    if scorer is None:
        class_names = ()
    elif class_names is None:
        class_names = sorted({record.label for record in captions if record.label})
    scored: list[Scored] = []
    for chunk in _chunks(progress(keys), _CHUNK):
        rows = list(reader.rows({key: names[key] for key in chunk}))
        scored += score_rows(rows, scorer, class_names)
    by_label: dict[str, list[Scored]] = {}
    for one in scored:
        by_label.setdefault(one.facts.label, []).append(one)
    distance, floor = half_cmmd(scored)
    return Survey(
        images=tuple(one.facts for one in scored),
        classes=tuple(summarize(label, by_label[label]) for label in sorted(by_label)),
        overall=summarize("All classes", scored),
        originals_in_store=len(names),
        variants_in_store=variants.count(recipe),
        captions_in_store=len(captions),
        cmmd=distance,
        cmmd_floor=floor,
        scorer="" if scorer is None else str(getattr(scorer, "id", type(scorer).__name__)),
    )


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
