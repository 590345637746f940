"""The record of one image: its caption, label and scores."""

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sgid_transforms.errors import StoreError

Source = Literal["model", "human", "import"]
SOURCES: tuple[Source, ...] = ("model", "human", "import")
MAX_KEY = 512
MAX_TEXT = 2**20

COLUMNS = (
    "key", "caption", "label", "similarity", "rank", "captioner", "source", "path", "scorer", "prompt",
    "context", "contradiction", "words",
)  # fmt: skip
"""The fields of a record, in the order of the table's columns."""

FOREIGN = int.from_bytes(b"foreign!", "big")
"""Replaces the digest of a row that another program wrote. It is neither a CRC nor a likely result of damage, such as 0."""


@dataclass(frozen=True)
class CaptionRecord:
    """What is known about one image.

    Args:
        key: Key of the image (``image_key``).
        caption: What the image shows.
        label: Name of its class.
        similarity: Cosine of the image and its prompt, from the scorer.
        rank: Rank of the similarity within the data set, in [0, 1].
        captioner: Id of the model, or of the person, that wrote the caption.
        source: Where the caption comes from. Only another human caption replaces a ``"human"`` one.
        path: Path of the image file, as the data set gives it.
        scorer: Id of the model that measured the similarity.
        prompt: The text that the similarity was measured with: label and caption in the recipe's template.
        context: What variants of other images may borrow from the caption (``Recipe.caption_from``); None: nothing.
        contradiction: How the caption contradicts the label. ``"words"``: it names another class but not its own.
            ``"scorer"``: the image is less similar to label and caption than to the label alone. May be both.
        words: What prompts call the image's class, if a person chose other words than the label.

    Examples:
        >>> CaptionRecord("0f" * 16, "a cat on a sofa", label="cat", source="human").caption
        'a cat on a sofa'
    """

    key: str
    caption: str
    label: str | None = None
    similarity: float | None = None
    rank: float | None = None
    captioner: str = ""
    source: Source = "model"
    path: str | None = None
    scorer: str | None = None
    prompt: str | None = None
    context: str | None = None
    contradiction: str | None = None
    words: str | None = None

    @property
    def prompt_label(self) -> str | None:
        """The class in the words of the prompt."""
        return self.words or self.label


def to_row(record: CaptionRecord) -> tuple[object, ...]:
    """A record as SQLite stores it.

    Lone surrogates, which come from undecodable file names and broken JSON, become U+FFFD in texts; a path keeps its bytes.
    A score that is not finite becomes None.

    Raises:
        StoreError: A field that cannot be stored.
    """
    if record.source not in SOURCES:
        raise StoreError(f"source {record.source!r} of caption {record.key!r:.80} is unknown; use one of {', '.join(SOURCES)}")
    if record.caption is None:
        raise StoreError(f"the caption of {record.key!r:.80} is None; leave the record out instead")
    return (
        check_key(record.key),
        _text("caption", record.caption),
        _text("label", record.label),
        _score("similarity", record.similarity),
        _score("rank", record.rank),
        _text("captioner", record.captioner),
        record.source,
        _path(record.path),
        _text("scorer", record.scorer),
        _text("prompt", record.prompt),
        _text("context", record.context),
        _text("contradiction", record.contradiction),
        _text("words", record.words),
    )


def from_row(row: tuple[Any, ...]) -> CaptionRecord | None:
    """A record from the columns ``COLUMNS`` and ``digest``, or ``None`` if its digest does not fit.

    Rows with the digest ``FOREIGN``, from stores before schema 3 or from other programs, are not checked.
    """
    key, caption, label, similarity, rank, captioner, source, path, scorer, prompt, context, contradiction, words, digest = row
    text = f"{key}\0{caption}\0{label}\0{similarity}\0{rank}\0{captioner}\0{source}\0{path}\0{scorer}\0{prompt}"
    if words is not None:
        text += f"\0{context}\0{contradiction}\0{words}"
    elif context is not None or contradiction is not None:
        text += f"\0{context}\0{contradiction}"
    if digest != zlib.crc32(text.encode()) and digest != FOREIGN:
        return None
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return CaptionRecord(
        key, caption, label, similarity, rank, captioner, source, path, scorer, prompt, context, contradiction, words
    )


def digest_of(row: Sequence[object]) -> int:
    """The CRC-32 of the columns ``COLUMNS``, as SQLite gives them. `from_row` inlines it to make hits fast.

    Those that schema 4 (the next two) and 5 (the last one) added count only if they are set, so that older digests stay valid.
    """
    end = next((end for start, end in ((12, 13), (10, 12)) if any(value is not None for value in row[start:end])), 10)
    return zlib.crc32("\0".join(map(str, row[:end])).encode())


def check_key(key: object) -> str:
    """``key``, if it can name a record.

    Raises:
        StoreError: Not a string, empty, too long, or not encodable.
    """
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
        raise StoreError(f"key {key!r:.80} is not a string of 1 to {MAX_KEY} characters; use image_key(image)")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise StoreError(f"key {key!r:.80} is not valid Unicode; use image_key(image), or a hash of your own id") from None
    return key


def _text(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise StoreError(f"{name} {value!r:.80} is a {type(value).__name__}, not a string")
    if len(value) > MAX_TEXT:
        raise StoreError(f"{name} {value!r:.40}... has {len(value)} characters; {MAX_TEXT} is the limit")
    return value if value.isascii() else "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)


def _path(value: object) -> str | bytes | None:
    """A path as text, or as its bytes if they are not UTF-8."""
    if value is None:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise StoreError(f"path {value!r:.80} is not a string of up to {MAX_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(value)
        except UnicodeEncodeError:  # a surrogate that cannot come from a file name
            return _text("path", value)
    return value


def _score(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise StoreError(f"{name} {value!r:.80} is not a number; pass a float, such as tensor.item()")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        return None
    return number if math.isfinite(number) else None
