"""Captions and similarities for a whole data set, once; what is there already is kept."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from sgid_transforms.building.factory import Describer
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.images.datasets import RawImages, RawSample
from sgid_transforms.images.keys import image_key, to_uint8_chw
from sgid_transforms.images.labels import label_name
from sgid_transforms.recipe.prompts import parse_template
from sgid_transforms.service.process import job_identity
from sgid_transforms.transforms.state import try_lock


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare` did.

    Args:
        images: items of the data set.
        captioned: distinct images that were captioned.
        scored: distinct images whose similarity was computed.
        known: items about which everything was known.
        failed: index and reason of each item that could not be read.
    """

    images: int
    captioned: int = 0
    scored: int = 0
    known: int = 0
    failed: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, eq=False)
class _Pending:
    key: str
    image: torch.Tensor
    label: str | None
    path: str | None
    known: CaptionRecord | None


@dataclass
class _Tally:
    captioned: int = 0
    scored: int = 0
    known: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)


def prepare(
    dataset: Any,
    captions: CaptionStore,
    *,
    template: str = "a photo of a {label}, {caption}",
    captioner: Any = "tiny",
    scorer: Any = "tiny",
    class_names: Mapping[str, str] | Sequence[str] | None = None,
    key: Callable[[Any], str] = image_key,
    stop: type | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    progress: bool = True,
) -> PrepareReport:
    """Caption every image of a map-style data set, score it against its prompt, and rank the scores.

    Interrupted, it goes on where it was; called again with more images, it does the new ones only (ranks are of the whole
    store, and so change a little). Ranks of a distributed job may all call it: the first one works, the others wait.

    Args:
        dataset: Items are an image with a label, as a tuple or dict. A ``transform`` that is set is looked past.
        captions: Where the result goes.
        template: The recipe's prompt template, against which the similarity is measured.
        captioner: Id of a captioner, or an object with ``caption(images)``.
        scorer: Id of a CLIP model, an object with ``image_text(images, texts)``, or None: no similarities.
        class_names: The name of each class number, or words for coded names; by default the data set's ``classes``.
        key: Names an image.
        stop: Type of the transform whose input is meant: what stands before it in the data set's ``Compose`` is applied.
        batch_size: Images per forward pass.
        device: Where the models run.
        progress: Show a progress bar.

    Raises:
        TypeError: It is not a map-style data set of images.
        ValueError: It gives another image each time (a random transform that cannot be looked past), or a class has no name.
        ModelLoadError: A model cannot be loaded.
        StoreError: The caption store cannot be written.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    images = RawImages(dataset, stop or type(None))
    _check_repeatable(images, key)
    lock = try_lock(f"{os.fspath(captions.path)}.lock", wait=True)
    try:
        job = job_identity(str(captions.path), str(len(images)))
        if lock is not None and job is not None and os.pread(lock, 200, 0) == job.encode():
            return PrepareReport(len(images), known=len(images))  # another rank of this job has just done it
        needs_label = any(name == "label" for _, name in parse_template(template))
        describer = Describer(template, captioner, scorer, device, batch_size)
        tally = _run(images, captions, describer, class_names, key, needs_label, batch_size, progress)
        if tally.scored:
            captions.set_ranks()
        if lock is not None and job is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, job.encode(), 0)
    finally:
        if lock is not None:
            os.close(lock)
    return PrepareReport(len(images), tally.captioned, tally.scored, tally.known, tuple(tally.failed))


def _run(
    images: RawImages,
    captions: CaptionStore,
    describer: Describer,
    class_names: Mapping[str, str] | Sequence[str] | None,
    key: Callable[[Any], str],
    needs_label: bool,
    batch_size: int,
    progress: bool,
) -> _Tally:
    tally = _Tally()
    pending: dict[str, _Pending] = {}
    read: list[tuple[str, RawSample]] = []
    with tqdm(total=len(images), desc="captions", unit="img", disable=not progress) as bar:
        for index in range(len(images)):
            try:
                sample = images[index]
                read.append((key(sample.image), sample))
            except (OSError, ValueError, TypeError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
                tally.failed.append((index, f"{type(error).__name__}: {error}"))
            if len(read) == batch_size or index == len(images) - 1:
                records = captions.get_many([name for name, _ in read])
                for name, one in read:
                    label = _name_of(one, class_names, needs_label)
                    known = records.get(name)
                    complete = known is not None and (known.similarity is not None or describer.scorer is None)
                    if complete and (known is None or known.label is not None or label is None):
                        tally.known += 1
                    elif name not in pending:
                        pending[name] = _Pending(name, to_uint8_chw(one.image), label, one.path, known)
                read.clear()
            if len(pending) >= batch_size or index == len(images) - 1:
                _flush(list(pending.values()), captions, describer, tally)
                pending.clear()
            bar.update()
    return tally


def _flush(pending: list[_Pending], captions: CaptionStore, describer: Describer, tally: _Tally) -> None:
    bare = [one for one in pending if one.known is None]
    texts = {one.key: one.known.caption for one in pending if one.known is not None}
    if bare:
        texts.update(zip((one.key for one in bare), describer.caption([one.image for one in bare]), strict=True))
    labels = [one.label or (one.known.label if one.known else None) for one in pending]
    scores = describer.score([one.image for one in pending], labels, [texts[one.key] for one in pending]) if pending else []
    captions.put_many(
        CaptionRecord(
            one.key,
            texts[one.key],
            label=label,
            similarity=score,
            captioner=describer.name if one.known is None else one.known.captioner,
            source="model" if one.known is None else one.known.source,
            path=one.path,
        )
        for one, label, score in zip(pending, labels, scores, strict=True)
    )
    tally.captioned += len(bare)
    tally.scored += sum(score is not None for score in scores)


def _name_of(sample: RawSample, class_names: Mapping[str, str] | Sequence[str] | None, needed: bool) -> str | None:
    """The class name in words: by the caller's names, else by the data set's own."""
    name = label_name(sample.label, class_names)
    if name is None and sample.classes is not None and not isinstance(sample.label, str):
        raw = sample.classes[sample.label] if isinstance(sample.label, int) and sample.label < len(sample.classes) else None
        name = label_name(raw, class_names if isinstance(class_names, Mapping) else None)
    if name is None and sample.label is not None and needed:
        raise ValueError(f"class {sample.label!r} has no name; pass class_names=[...] in the order of the class numbers")
    return name


def _check_repeatable(images: RawImages, key: Callable[[Any], str]) -> None:
    if len(images) == 0:
        return
    try:
        twice = [key(images[0].image) for _ in range(2)]
    except OSError:  # one unreadable file; it is listed with the others
        return
    if twice[0] != twice[1]:
        raise ValueError(
            "the data set gives another image each time item 0 is read; pass it without its random transforms, "
            "or keep them in its `transform`, behind SGIDAugment, where they are looked past"
        )
