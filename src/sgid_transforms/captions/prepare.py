"""Captions and similarities for a whole data set. Existing results that still apply are kept."""

import contextlib
import functools
import inspect
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from sgid_transforms.captions.agreement import ClassWords, checked, lenders
from sgid_transforms.captions.record import CaptionRecord
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import StoreError
from sgid_transforms.files import Waiting, job_identity, try_lock
from sgid_transforms.images.datasets import RawImages, RawSample
from sgid_transforms.images.folders import lies_in_ours
from sgid_transforms.images.forms import check_form, shrunk
from sgid_transforms.images.keys import image_key, to_uint8_chw
from sgid_transforms.images.labels import ClassNames, check_class_names, label_name
from sgid_transforms.images.reading import check_size
from sgid_transforms.models.loading import check_device
from sgid_transforms.recipe.checks import integer
from sgid_transforms.recipe.prompts import build_prompt, context_of, parse_template

_log = logging.getLogger("sgid_transforms")

_LOCK_PAUSE = 0.05  # seconds until the next try
_PIXELS = 2**25  # the most pixels of pictures waiting in memory for their batch


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Args:
        images: Items of the data set.
        captioned: Distinct images that were captioned.
        scored: Distinct images whose similarity was computed.
        known: Items that were already complete.
        failed: Index and reason of each item that could not be read.
        changed: How many images were redone, by what had changed: ``captioner``, ``scorer``, ``label``, ``prompt``.
        contradictions: Images in the store whose caption contradicts their label; counted where there was something to do.
    """

    images: int
    captioned: int = 0
    scored: int = 0
    known: int = 0
    failed: tuple[tuple[int, str], ...] = ()
    changed: Mapping[str, int] = field(default_factory=dict)
    contradictions: int = 0


class Describer:
    """Captions images and scores them against their prompts; the models are loaded at the first call.

    Args:
        template: The recipe's prompt template.
        captioner: Id of the captioner, or an object with ``caption(images)``; for a mode other than ``"free"``, with
            ``caption(images, labels)``.
        scorer: Id of the CLIP model, or an object with ``image_text(images, texts)``; None: no scores.
        device: Where models given by id run.
        batch_size: Images per forward pass.
        mode: The recipe's ``caption_mode``.

    Raises:
        TypeError: The captioner takes no labels, and the mode needs them.
    """

    def __init__(
        self, template: str, captioner: Any, scorer: Any, device: str = "cpu", batch_size: int = 32, mode: str = "free"
    ) -> None:
        self.template, self.captioner, self.scorer = template, captioner, scorer
        self.device, self.batch_size, self.mode = device, batch_size, mode
        if mode != "free" and not isinstance(captioner, str) and not _takes_labels(captioner):
            raise TypeError(
                f"captioner {_name(captioner)} has no caption(images, labels), so caption_mode={mode!r} cannot work; "
                "use caption_mode='free', or another captioner"
            )
        self.name = _name(captioner) if mode == "free" else f"{_name(captioner)} ({mode})"
        self.scorer_name = None if scorer is None else _name(scorer)
        self._captioner: Any = None if isinstance(captioner, str) else captioner
        self._scorer: Any = None if isinstance(scorer, str) else scorer

    @property
    def identity(self) -> str:
        """Everything but the image that decides a record."""
        return repr((self.template, self.name, self.scorer_name))

    def caption(self, images: Sequence[torch.Tensor], labels: Sequence[str | None]) -> list[str]:
        """One caption per uint8 ``(3, H, W)`` image; labels are ignored in mode ``"free"``."""
        if self._captioner is None:
            from sgid_transforms.models.captioner import Captioner

            self._captioner = Captioner(self.captioner, device=self.device, batch_size=self.batch_size, mode=self.mode)
        texts = self._captioner.caption(images) if self.mode == "free" else self._captioner.caption(images, labels)
        if not isinstance(texts, list | tuple) or len(texts) != len(images) or not all(isinstance(one, str) for one in texts):
            raise TypeError(f"captioner {self.name} returned {texts!r:.80} for {len(images)} images, not a list of strings")
        return list(texts)

    def prompt(self, label: str | None, caption: str) -> str:
        """The text that an image is scored against."""
        return build_prompt(self.template, label, caption) if label else caption

    def score(self, images: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float | None]:
        """CLIP cosine of each image and its prompt; None without a scorer."""
        if self.scorer is None:
            return [None] * len(images)
        if self._scorer is None:
            from sgid_transforms.models.clip import CLIPScorer

            self._scorer = CLIPScorer(self.scorer, device=self.device)
        if not images:
            return []
        scores = self._scorer.image_text(list(images), list(prompts))
        try:
            numbers = [float(value) for value in scores]
        except (TypeError, ValueError, RuntimeError):
            numbers = []
        if len(numbers) != len(images):
            raise TypeError(f"scorer {self.scorer_name} returned {scores!r:.80} for {len(images)} images, not a number each")
        return list(numbers)

    def describe(self, known: Sequence[tuple[CaptionRecord, torch.Tensor]]) -> list[CaptionRecord]:
        """Complete records: caption those without caption and captioner, and score all of them.

        Args:
            known: Incomplete records with their images, uint8 ``(3, H, W)``.
        """
        known = [(record, shrunk(image)) for record, image in known]
        bare = [index for index, (record, _) in enumerate(known) if not record.captioner and not record.caption]
        records = [record for record, _ in known]
        texts = self.caption([known[i][1] for i in bare], [records[i].label for i in bare]) if bare else []
        for index, text in zip(bare, texts, strict=True):
            records[index] = replace(records[index], caption=text, captioner=self.name, source="model")
        images = [image for _, image in known]
        prompts = [self.prompt(record.prompt_label, record.caption) for record in records]
        scores = self.score(images, prompts)
        both = [i for i, (record, score) in enumerate(zip(records, scores, strict=True)) if score is not None and record.label]
        bare_scores = self.score([images[i] for i in both], [self.prompt(records[i].prompt_label, "") for i in both])
        doubted = {i for i, bare_score in zip(both, bare_scores, strict=True) if scores[i] < bare_score}  # type: ignore[operator]
        return [
            replace(record, contradiction=None)
            if score is None
            else replace(
                record, similarity=score, rank=None, scorer=self.scorer_name, prompt=prompt,
                contradiction="scorer" if index in doubted else None,
            )
            for index, (record, score, prompt) in enumerate(zip(records, scores, prompts, strict=True))
        ]  # fmt: skip

    def context(self, record: CaptionRecord) -> str:
        """What other images may borrow from a record's caption: all of it, if the captioner left out the subject."""
        return record.caption if self.mode == "context" and record.captioner == self.name else context_of(record.caption)


@contextlib.contextmanager
def alone(captions: CaptionStore, timeout: float | None = None) -> Iterator[int | None]:
    """Let only one process at a time caption into a store, so that no caption is written twice.

    Yields the descriptor of the lock file; None where none can be created, such as beside a read-only store.

    Raises:
        StoreError: Another process was still captioning after ``timeout`` seconds.
    """
    lock = None
    waiting = Waiting(f"another process that writes captions into {captions.path}", timeout)
    try:
        while (lock := try_lock(f"{os.fspath(captions.path)}.lock")) is None:
            time.sleep(min(_LOCK_PAUSE, waiting.check()))
    except TimeoutError as error:
        raise StoreError(f"{error}; give it more time, or stop that process") from None
    except OSError:  # no lock file can be created here
        pass
    try:
        yield lock
    finally:
        if lock is not None:
            os.close(lock)


class Entry(NamedTuple):
    """One image that needs a record.

    Args:
        key: Key of the image.
        label: Its class name in words.
        path: Path of its file.
        load: Returns the picture, in any form that has a key; raises ``ImageError`` if it can no longer be read.
        pixels: Size of the picture, if it stays in memory until its turn comes.
    """

    key: str
    label: str | None
    path: str | None
    load: Callable[[], Any]
    pixels: int = 0


@dataclass
class Tally:
    """What was done so far."""

    captioned: int = 0
    scored: int = 0
    known: int = 0
    failed: list[tuple[str | None, str]] = field(default_factory=list)
    changed: dict[str, int] = field(default_factory=dict)
    contradictions: int = 0


def prepare(
    dataset: Any,
    captions: CaptionStore,
    *,
    template: str = "a photo of a {label}, {caption}",
    captioner: Any = "tiny",
    scorer: Any = "tiny",
    class_names: ClassNames | None = None,
    key: Callable[[Any], str] = image_key,
    stop: type | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    progress: bool = True,
    timeout: float | None = None,
    mode: str = "free",
) -> PrepareReport:
    """Caption every image of a map-style data set, score it against its prompt, and rank the scores.

    Resumes after an interruption. A later call handles new images and redoes what is outdated: captions of another captioner,
    and scores of another scorer, template, label or caption. Human and imported captions stay. All ranks of a distributed job
    may call it: the first one works, the others wait.

    Args:
        dataset: Its items are images with labels, as tuples or dicts. Its ``transform`` is skipped; see ``stop``.
        captions: Where the result goes.
        template: The recipe's prompt template, against which the similarity is measured.
        captioner: Id of a captioner, or an object with ``caption(images)``.
        scorer: Id of a CLIP model, an object with ``image_text(images, texts)``, or None: no similarities.
        class_names: The name of each class number, or words for coded names; by default the data set's ``classes``.
        key: Returns the key of an image.
        stop: Type of a transform in the data set's ``Compose``; the transforms before it are applied.
        batch_size: Images per forward pass.
        device: Where the models run.
        progress: Show a progress bar.
        timeout: Seconds to wait while another process captions into the same store; None: no limit.
        mode: The recipe's ``caption_mode``.

    Raises:
        TypeError: It is not a map-style data set of images, or the mode needs labels and the captioner takes none.
        ValueError: It gives another image each time (a random transform that cannot be skipped), or a class has no name.
        ModelLoadError: A model cannot be loaded.
        StoreError: The caption store cannot be written, or another process was still captioning after ``timeout`` seconds.
    """
    batch_size = integer("batch_size", batch_size, minimum=1, maximum=10**6)
    check_class_names(class_names)
    device = str(check_device(device))
    images = RawImages(dataset, stop or type(None))
    _check_repeatable(images, key)
    describer = Describer(template, captioner, scorer, device, batch_size, mode)
    needs_label = any(name == "label" for _, name in parse_template(template))
    failed: list[tuple[int, str]] = []
    unlabelled = 0
    with alone(captions, timeout) as lock:
        job = job_identity(str(captions.path), images.identity(key), describer.identity, repr(class_names))
        if lock is not None and job is not None and os.pread(lock, 200, 0) == job.encode():
            return PrepareReport(len(images), known=len(images))  # another rank of this job has just done it
        ours = functools.cache(lies_in_ours)  # only for this call, because folders change
        with tqdm(total=len(images), desc="captions", unit="img", disable=not progress) as bar:

            def entries() -> Iterator[Entry]:
                nonlocal unlabelled
                for index in range(len(images)):
                    try:
                        sample = images[index]
                        if sample.path is not None and ours(Path(sample.path).parent):
                            raise ValueError("it is a variant or an export, not an original; keep those elsewhere")
                        check_form(sample.image)
                        check_size(*_size(sample.image))
                        name = key(sample.image)
                    except Exception as error:  # anything from a data set's own code: one bad item must not end the job
                        failed.append((index, f"{type(error).__name__}: {error}"))
                    else:
                        label = _name_of(sample, class_names, needs_label or mode != "free")
                        unlabelled += sample.label is None
                        if label is None and mode != "free":
                            failed.append((index, f"it has no label, and caption_mode={mode!r} needs one"))
                            bar.update()
                            continue
                        load = functools.partial(_identity, sample.image)
                        yield Entry(name, label, sample.path, load, _pixels(sample.image))
                    bar.update()

            tally = complete(entries(), captions, describer, synonyms=class_names if isinstance(class_names, Mapping) else None)
        if unlabelled and needs_label:
            _log.warning(
                "%d of %d items have no label that can be read (a class number or name); the prompt needs one",
                unlabelled,
                len(images),
            )
        if lock is not None and job is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, job.encode(), 0)
    return PrepareReport(
        len(images), tally.captioned, tally.scored, tally.known, tuple(failed), tally.changed, tally.contradictions
    )


def complete(
    entries: Iterable[Entry],
    captions: CaptionStore,
    describer: Describer,
    stopped: Callable[[], bool] = lambda: False,
    synonyms: Mapping[Any, str] | None = None,
) -> Tally:
    """Bring the records of some images up to date, batch by batch, and rank the new similarities.

    New images are captioned and scored. Outdated records are redone, which is logged in one line.

    Args:
        entries: The images.
        captions: Where their records are.
        describer: Writes captions and scores.
        stopped: Whether the entries ended too early. Ranks and contexts need the whole data set, and once set they stay.
        synonyms: Further class names, by which captions may contradict their labels.
    """
    tally = Tally()
    waiting: list[Entry] = []
    moved: list[CaptionRecord] = []  # records whose image file has moved
    pending: dict[str, tuple[CaptionRecord, torch.Tensor]] = {}

    def decide() -> None:
        records = captions.get_many([entry.key for entry in waiting])
        for entry in waiting:
            known = records.get(entry.key)
            stale = None if known is None else _stale(known, entry, describer)
            if known is not None and stale == "":
                tally.known += 1
                if entry.path is not None and entry.path != known.path and not os.path.exists(known.path or ""):
                    moved.append(replace(known, path=entry.path))
            elif entry.key not in pending:
                record = _to_do(known, entry, stale, describer)
                try:
                    pending[entry.key] = (record, shrunk(to_uint8_chw(entry.load())))
                except Exception as error:
                    tally.failed.append((entry.path, str(error)))
                    continue
                tally.captioned += not record.captioner and not record.caption
                if stale and stale != "score":
                    tally.changed[stale] = tally.changed.get(stale, 0) + 1
        waiting.clear()
        captions.put_many(moved)
        moved.clear()

    def flush() -> None:
        if pending:
            done = describer.describe(list(pending.values()))
            captions.put_many(done)
            tally.scored += sum(record.similarity is not None for record in done) if describer.scorer is not None else 0
            pending.clear()

    for entry in entries:
        waiting.append(entry)
        if len(waiting) >= describer.batch_size or sum(one.pixels for one in waiting) > _PIXELS:
            decide()
        if len(pending) >= describer.batch_size:
            flush()
    decide()
    flush()
    if not stopped():
        if tally.scored or captions.lacks_ranks():
            captions.set_ranks(keep=True)
        if tally.captioned or tally.scored or tally.changed:
            words = ClassWords({record.label for record in captions if record.label}, synonyms)
            for chunk in _chunks(checked(captions, words)):
                captions.put_many(chunk)
            tally.contradictions = sum(record.contradiction is not None for record in captions)
        if "captioner" in tally.changed or not captions.contexts():
            captions.set_contexts(lenders(captions, describer.context))
    if tally.changed:
        parts = ", ".join(f"{count} for another {what}" for what, count in sorted(tally.changed.items()))
        _log.warning("images captioned or scored again: %s; variants made from the old texts are no longer used", parts)
    return tally


def _chunks(records: Iterator[CaptionRecord]) -> Iterator[list[CaptionRecord]]:
    while chunk := list(itertools.islice(records, 500)):
        yield chunk


def _identity(image: Any) -> Any:
    return image


def _size(image: Any) -> tuple[int, int]:
    """Width and height."""
    return (image.width, image.height) if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])


def _pixels(image: Any) -> int:
    return math.prod(_size(image))


def _stale(known: CaptionRecord, entry: Entry, describer: Describer) -> str | None:
    """What is outdated in a record: ``""`` for nothing, ``"score"`` for a score that was missing."""
    if known.source == "model" and known.captioner and known.captioner != describer.name:
        return "captioner"
    if entry.label is not None and known.label != entry.label:
        return "label" if known.label is not None else "score"
    if describer.scorer is None:
        return ""
    if known.similarity is None:
        return "score"
    if known.scorer != describer.scorer_name:
        return "scorer" if known.scorer is not None else "score"
    return "" if known.prompt == describer.prompt(known.prompt_label, known.caption) else "prompt"


def _to_do(known: CaptionRecord | None, entry: Entry, stale: str | None, describer: Describer) -> CaptionRecord:
    """The record without its outdated parts; its caption is empty if one must be written."""
    if known is not None and stale == "label" and describer.mode != "free" and known.captioner == describer.name:
        stale = "captioner"  # the captioner was given the old label
    if known is None or stale == "captioner":
        label = entry.label if entry.label is not None or known is None else known.label
        return CaptionRecord(entry.key, "", label=label, path=entry.path)
    label = entry.label if entry.label is not None else known.label
    words = None if stale == "label" else known.words  # they were chosen for the old label
    return replace(known, label=label, words=words, path=entry.path or known.path, similarity=None, rank=None)


def _takes_labels(captioner: Any) -> bool:
    try:
        inspect.signature(captioner.caption).bind([], [])
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _name(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model, "id", type(model).__name__))


def _name_of(sample: RawSample, class_names: ClassNames | None, needed: bool) -> str | None:
    """The class name in words: from the caller's names, else from the data set's own."""
    name = label_name(sample.label, class_names, sample.classes)
    if name is None and needed and not _means_none(sample.label):
        raise ValueError(f"class {sample.label!r} has no name; pass class_names=[...] in the order of the class numbers")
    return name


def _means_none(label: Any) -> bool:
    """Whether there is no label: None, or a negative number, as some data sets use."""
    return label is None or (isinstance(label, int) and label < 0)


def _check_repeatable(images: RawImages, key: Callable[[Any], str]) -> None:
    if len(images) == 0:
        return
    try:
        twice = [key(images[0].image) for _ in range(2)]
    except TypeError:  # items without an image: not a data set of images
        raise
    except Exception:  # an unreadable item is listed later, with the others
        return
    if twice[0] != twice[1]:
        raise ValueError(
            "the data set gives another image each time item 0 is read; pass it without its random transforms, "
            "or put them behind SGIDAugment in its `transform`, where they are skipped"
        )
