"""What the review shows: originals and their variants, read from the stores one page at a time."""

import functools
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.building.address import Address
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ImageError, MissingCaptionError, SGIDError
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.recipe.prompts import context_of
from sgid_transforms.recipe.recipe import Recipe
from sgid_transforms.report.html import encode
from sgid_transforms.report.metrics import Scorer
from sgid_transforms.variants.layout import image_key_of, image_part
from sgid_transforms.variants.store import VariantRef, VariantStore

_log = logging.getLogger("sgid_transforms")

_SIDE = 320  # pixels of the longest side of a picture on the page
_PICTURES = 4096  # kept in memory
_SCORED_AT_ONCE = 16


class NotFoundError(SGIDError, LookupError):
    """There is no such image or variant, or it must not be shown."""


@dataclass(frozen=True)
class Entry:
    """One original, as far as lists and searches need it."""

    key: str
    label: str
    text: str
    order: tuple[str, str]


class Gallery:
    """The originals of a caption store with their variants of one recipe.

    Args:
        captions: What is known about the originals.
        variants: The variants.
        recipe: The recipe of these variants.
        root: Folder of the originals; files outside of it are not shown, wherever a record's path or a link leads.
        scorer: Measures label scores and similarities that the variants' provenance lacks; None: nothing does.
    """

    def __init__(
        self, captions: CaptionStore, variants: VariantStore, recipe: Recipe, root: Path, scorer: Scorer | None = None
    ) -> None:
        self.captions, self.variants, self.recipe, self.root = captions, variants, recipe, root.resolve()
        self._entries = {record.key: _entry(record) for record in captions}
        self._sorted = sorted(self._entries.values(), key=lambda entry: entry.order)
        self._scorer = scorer
        self._scores: dict[str, tuple[float, float]] = {}  # lowest label score and lowest similarity of an image's variants
        self._scoring: threading.Thread | None = None
        self._last: tuple[Any, list[str]] = (None, [])
        self.picture = functools.lru_cache(_PICTURES)(self._picture)
        self.refresh()

    def refresh(self) -> None:
        """Forget which contexts images lend, after one has changed."""
        self.address = Address(self.recipe, self.captions)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def labels(self) -> list[str]:
        """The class names, sorted."""
        return sorted({entry.label for entry in self._sorted if entry.label})

    @property
    def scored(self) -> int:
        """How many originals have been scored since the first order by scores was asked for."""
        return len(self._scores)

    def select(self, label: str = "", search: str = "", order: str = "class", state: str = "all", who: str = "") -> list[str]:
        """Keys of the originals that match, in order.

        Args:
            label: Only this class.
            search: Only those whose caption, class or file name contains this text, in any case.
            order: ``"class"``: by class and file name; ``"label"``: lowest label score first; ``"change"``: most changed first.
                The last two order what has been scored so far, which goes on in the background; the others follow.
            state: ``"all"``; ``"rejected"``: with variants that ``who`` rejected; ``"unjudged"``: without any verdict.
            who: A person's name.
        """
        if order != "class":
            self._score_in_background()
        judged = self.variants.all_verdicts()
        question = (label, search, order, state, who, len(judged), self.scored if order != "class" else 0, len(self._entries))
        if self._last[0] == question:
            return self._last[1]
        wanted = search.casefold()
        entries: Sequence[Entry] = self._sorted
        if label:
            entries = [entry for entry in entries if entry.label == label]
        if wanted:
            entries = [entry for entry in entries if wanted in entry.text]
        if state != "all":
            standing = self.variants.verdicts()
            named = {
                image_key_of(name[1])
                for name, verdict in standing.items()
                if name[0] == self.recipe.fingerprint
                and (state == "unjudged" or (verdict.decision == "reject" and verdict.who == who))
            }
            entries = [entry for entry in entries if (image_part(entry.key) in named) == (state == "rejected")]
        if order != "class":
            column = 0 if order == "label" else 1
            worst = (math.inf, math.inf)
            entries = sorted(entries, key=lambda entry: self._scores.get(entry.key, worst)[column])
        keys = [entry.key for entry in entries]
        self._last = question, keys
        return keys

    def record(self, key: str) -> CaptionRecord:
        """The record of one original.

        Raises:
            NotFoundError: There is none.
        """
        record = self.captions.get(key)
        if record is None:
            raise NotFoundError("there is no such image; reload the page")
        return record

    def current(self, record: CaptionRecord) -> list[VariantRef]:
        """The variants of an image that training finds, by number."""
        return [ref for ref in self.variants.find(self.recipe, record.key) if ref.key == self.place(record, ref.variant)]

    def place(self, record: CaptionRecord, number: int) -> str | None:
        """The key of one variant of an image; None if it cannot have one."""
        try:
            return self.address.key(record, number)
        except MissingCaptionError:
            return None

    def row(self, key: str) -> dict[str, Any]:
        """One original with its variants, for the page."""
        record = self.record(key)
        verdicts = self.variants.verdicts()
        variants = []
        for ref in self.current(record):
            made = self.variants.provenance(self.recipe, ref.key, ref.variant)
            if made is not None:
                verdict = verdicts.get((ref.fingerprint, ref.key, ref.variant))
                variants.append(
                    {
                        "number": ref.variant,
                        "key": ref.key,
                        "prompt": made.prompt,
                        "strength": made.strength,
                        "guidance": made.guidance_scale,
                        "label_score": made.label_score,
                        "similarity": made.image_similarity,
                        "decision": verdict.decision if verdict else "none",
                        "who": verdict.who if verdict else "",
                        "why": verdict.why if verdict else "",
                    }
                )
        return {
            "key": key,
            "label": record.label or "",
            "words": record.words or "",
            "caption": record.caption,
            "source": record.source,
            "contradiction": record.contradiction or "",
            "name": "/".join(Path(record.path).parts[-2:]) if record.path else "",
            "lends": record.context is not None,
            "variants": variants,
        }

    def original(self, key: str) -> torch.Tensor:
        """The picture of an original, uint8 ``(3, H, W)``.

        Raises:
            NotFoundError: It has no file, cannot be read, or lies outside of the originals' folder.
        """
        record = self.record(key)
        if not record.path:
            raise NotFoundError("this image has no file")
        try:
            path = Path(record.path).resolve()
            if not path.is_relative_to(self.root):
                raise NotFoundError(f"the file lies outside of {self.root}; give its folder as DATA")
            return to_uint8_chw(load_image(path))
        except (ImageError, OSError, ValueError) as error:
            raise NotFoundError(f"the file cannot be read: {error}") from None

    def _picture(self, key: str, number: int | None) -> tuple[bytes, str]:
        """File and media type of an original, or of the variant with this store key."""
        if number is None:
            image: torch.Tensor | None = self.original(key)
        else:
            image = self.variants.get_image(self.recipe, key, number)
        if image is None:
            raise NotFoundError("there is no such variant")
        return encode(image, _SIDE)[:2]

    def prompts(self, record: CaptionRecord, count: int) -> list[tuple[str, str]]:
        """Words for the class and caption of the first ``count`` variants, without those that repeat one."""
        try:
            found = [(record.prompt_label or "", self.address.caption(record, number)[0]) for number in range(count)]
        except MissingCaptionError:
            found = [(record.prompt_label or "", record.caption)]
        return list(dict.fromkeys(found))

    def edit(self, key: str, caption: str, words: str, who: str) -> None:
        """Store a person's caption of an image, and words for its class; the image lends the context of that caption."""
        record = self.record(key)
        changed = replace(
            record,
            caption=caption,
            words=words if words and words != record.label else None,
            captioner=who,
            source="human",
            prompt=None,
            contradiction=None,
        )
        if caption != record.caption:
            changed = replace(changed, similarity=None, rank=None, scorer=None)
        self.captions.put(changed)
        if record.context is not None:
            self.captions.set_context(key, context_of(caption))
        self._entries[key] = _entry(changed)
        self._sorted = sorted(self._entries.values(), key=lambda entry: entry.order)
        self._last = None, []
        self.refresh()

    def _score_in_background(self) -> None:
        if self._scoring is None:
            self._scoring = threading.Thread(target=self._score_all, name="sgid-review-scores", daemon=True)
            self._scoring.start()

    def _score_all(self) -> None:
        keys = iter([entry.key for entry in self._sorted])
        labels = self.labels
        try:
            while chunk := list(itertools.islice(keys, _SCORED_AT_ONCE)):
                for key, found in self._score(chunk, labels):
                    self._scores[key] = found
        except Exception as error:  # the page goes on without scores
            _log.warning("the variants cannot be scored: %s", error)

    def _score(self, keys: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[str, tuple[float, float]]]:
        """Lowest label score and lowest similarity to the original, of each original's variants."""
        for record in self.captions.get_many(keys).values():
            refs = self.current(record)
            known = [self.variants.provenance(self.recipe, ref.key, ref.variant) for ref in refs]
            scores = [one.label_score for one in known if one is not None and one.label_score is not None]
            similarities = [one.image_similarity for one in known if one is not None and one.image_similarity is not None]
            lacks = len(scores) < len(refs) or len(similarities) < len(refs)
            if refs and self._scorer is not None and lacks:
                images = [self.variants.get_image(self.recipe, ref.key, ref.variant) for ref in refs]
                features = self._scorer.image_features([image for image in images if image is not None])
                if record.label in labels and len(labels) > 1:
                    scores = self._scorer.probabilities(features, labels)[:, labels.index(record.label)].tolist()
                try:
                    original = self._scorer.image_features([self.original(record.key)])
                    similarities = (features @ original.T).flatten().tolist()
                except NotFoundError:
                    pass
            yield record.key, (min(scores, default=math.inf), min(similarities, default=math.inf))


def _entry(record: CaptionRecord) -> Entry:
    name = os.path.basename(record.path or "")
    text = f"{record.label or ''}\0{record.words or ''}\0{record.caption}\0{name}".casefold()
    return Entry(record.key, record.label or "", text, (record.label or "", record.path or record.key))
