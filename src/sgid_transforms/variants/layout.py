"""Where a variant lives below the root of its store, which names are allowed, and what the bytes of its file are.

Names are checked before any path is built from them, so no key or fingerprint can lead out of the store.

A variant's key is its image's key, followed by a digest of the text and the guidance that it was made with (`variant_key`).
When an image's caption or label changes, its old variants are no longer found, and it gets new ones.

A variant file is an ordinary image file, then a footer with the provenance and a digest::

    image    a complete PNG, JPEG or WebP file; viewers stop at its own end and ignore the rest
    json     the provenance, ASCII JSON
    length   4 bytes, little endian: size of ``json``
    magic    8 bytes: ``SGIDvar1``
    digest   32 bytes: SHA-256 of the name ``<fingerprint>/<k0k1>/<key>-<variant>`` followed by all bytes before the digest

The name is part of the digest, so a file that was renamed or copied to another variant's place is detected as well. A variant
that could not be made has a small JSON file with the reasons in its place.
"""

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from sgid_transforms.errors import StoreError

FORMAT_VERSION = 2
"""1: keys named the image alone; 2: keys name the image and the text that its variants were made with."""

EXTENSIONS = (".png", ".jpg", ".webp")
FAILURE_SUFFIX = ".failed.json"
QUARANTINE = "quarantine"
PACKS = "packs"
TEMPORARY = "tmp"
ORPHAN_AGE = 3600.0
"""Seconds after which a temporary file of another host counts as left behind."""

MAX_JSON = 2**20
MAX_FILE = 2**28
MAX_FAILURE = 2**18
_MAX_REASONS = 32
_MAX_REASON = 1000

MAGIC = b"SGIDvar1"
_TAIL = struct.Struct("<I8s")
_DIGEST = 32
_FOOTER = _TAIL.size + _DIGEST

_TEXT_DIGITS = 16
_encode = json.JSONEncoder(separators=(",", ":")).encode  # kept, since json.dumps makes a new one at every call

_FINGERPRINT = re.compile(r"[0-9a-z][0-9a-z_-]{3,63}")
_KEY = re.compile(r"[0-9a-f]{8,64}")
_FILE = re.compile(r"([0-9a-f]{8,64})-(0|[1-9][0-9]{0,8})(\.png|\.jpg|\.webp|\.failed\.json)")
_SHARD = re.compile(r"[0-9a-f]{2}")
_MAX_VARIANT = 999_999_999


class DamagedFileError(ValueError):
    """A file in the store, or the image in it, is not what a store wrote there; the message says what is wrong."""


class HasFingerprint(Protocol):
    """What a store needs of a recipe: its fingerprint and the format that its images are stored in."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def image_format(self) -> str: ...


class FileName(NamedTuple):
    """The name of a store's file below its root, taken apart."""

    fingerprint: str
    key: str
    variant: int
    suffix: str

    @property
    def is_failure(self) -> bool:
        return self.suffix == FAILURE_SUFFIX

    @property
    def max_size(self) -> int:
        return MAX_FAILURE if self.is_failure else MAX_FILE

    @property
    def stem(self) -> str:
        return f"{self.fingerprint}/{stem(self.key, self.variant)}"


def variant_key(image_key: str, *text: object) -> str:
    """The key of an image's variants under one text: the image's key and 16 hex digits of a hash of ``text``.

    A key of more than 48 digits, which users may give their images, is hashed to make room for them.
    """
    digest = hashlib.sha256(_encode(text).encode("ascii"))
    return image_part(image_key) + digest.hexdigest()[:_TEXT_DIGITS]


def image_part(image_key: str) -> str:
    """How the keys of an image's variants begin."""
    if len(image_key) > 64 - _TEXT_DIGITS:
        return hashlib.sha256(image_key.encode()).hexdigest()[: 64 - _TEXT_DIGITS]
    return image_key


def image_key_of(key: str) -> str:
    """The part of a variant's key that names the image."""
    return key[:-_TEXT_DIGITS]


def check_fingerprint(recipe: HasFingerprint | str) -> str:
    """The fingerprint of ``recipe``; refused if it cannot be a folder name of a store."""
    fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
    if not is_fingerprint(fingerprint):
        raise StoreError(
            f"fingerprint {fingerprint!r:.80} is not 4 to 64 of a-z, 0-9, - and _; pass a Recipe or its .fingerprint"
        )
    return fingerprint


def is_fingerprint(name: str) -> bool:
    """Whether ``name`` can be the folder of one recipe."""
    return _FINGERPRINT.fullmatch(name) is not None and name not in (QUARANTINE, PACKS)


def is_shard(name: str) -> bool:
    """Whether ``name`` can be one of a recipe's 256 folders."""
    return _SHARD.fullmatch(name) is not None


def stem(key: str, variant: int) -> str:
    """``<k0k1>/<key>-<variant>``: the path of a variant below its recipe's folder, without the extension."""
    # The two checks run on every look-up during training: keep them to one regular expression and one comparison.
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise StoreError(f"key {key!r:.80} is not 8 to 64 lowercase hex digits; use image_key(image), or a hash of your own id")
    if type(variant) is not int or not 0 <= variant <= _MAX_VARIANT:
        raise StoreError(f"variant {variant!r:.80} is not a whole number from 0 to {_MAX_VARIANT}")
    return f"{key[:2]}/{key}-{variant}"


def parse(fingerprint: str, shard: str, name: str) -> FileName | None:
    """Take a file's name apart; ``None`` for a name that no store writes into the folder ``fingerprint/shard``."""
    found = _FILE.fullmatch(name)
    if found is None or not name.startswith(shard):
        return None
    return FileName(fingerprint, found[1], int(found[2]), found[3])


def pack(image: bytes, provenance: bytes, name: str) -> bytes:
    """The bytes of a variant file (see the layout above)."""
    if len(provenance) > MAX_JSON:
        raise StoreError(f"a provenance of {len(provenance)} bytes is too long; {MAX_JSON} is the limit")
    body = b"".join((image, provenance, _TAIL.pack(len(provenance), MAGIC)))
    return body + _digest(body, name)


def unpack(data: bytes, name: str) -> tuple[memoryview, memoryview]:
    """Check a variant file.

    Returns:
        The image and the JSON, as views of ``data``: a copy would cost as much as reading the file.

    Raises:
        DamagedFileError: Foreign, cut off, changed, or meant for another name.
    """
    if len(data) <= _FOOTER:
        raise DamagedFileError(f"{len(data)} bytes are too few for a variant")
    body = memoryview(data)[:-_DIGEST]
    length, magic = _TAIL.unpack_from(body, len(body) - _TAIL.size)
    if magic != MAGIC:
        raise DamagedFileError("it has no footer: cut off, or not written by a variant store")
    if _digest(body, name) != data[-_DIGEST:]:
        raise DamagedFileError("its digest does not match: changed, or renamed")
    image_end = len(body) - _TAIL.size - length
    if image_end <= 0:
        raise DamagedFileError("its footer is longer than the file")
    return body[:image_end], body[image_end : -_TAIL.size]


def _digest(body: bytes | memoryview, name: str) -> bytes:
    digest = hashlib.sha256(name.encode("ascii"))
    digest.update(body)
    return digest.digest()


def pack_marker() -> bytes:
    """The file that marks a folder as a store. A digest detects damage, which would otherwise affect all files."""
    return json.dumps({"format": FORMAT_VERSION, "check": _marker_check(FORMAT_VERSION)}).encode("ascii")


def unpack_marker(data: bytes) -> int:
    """The format of a store. A damaged marker counts as 1, the oldest format, so that all files can still be read."""
    try:
        marker = json.loads(data)
        version = marker["format"]
        known = type(version) is int and 0 < version <= FORMAT_VERSION
        return version if known or marker["check"] == _marker_check(version) else 1
    except (ValueError, TypeError, KeyError, RecursionError):
        return 1


def _marker_check(version: object) -> str:
    return hashlib.sha256(f"sgid-variants {version}".encode()).hexdigest()[:16]


def pack_failure(reasons: Sequence[str]) -> bytes:
    """The file's bytes, cut to 32 reasons of 1000 characters each."""
    if isinstance(reasons, str):
        reasons = (reasons,)
    return json.dumps({"reasons": [str(reason)[:_MAX_REASON] for reason in reasons[:_MAX_REASONS]]}).encode("ascii")


def unpack_failure(data: bytes) -> tuple[str, ...]:
    """The reasons.

    Raises:
        DamagedFileError: The bytes are not what `pack_failure` makes.
    """
    try:
        reasons = json.loads(data)["reasons"]
        if isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons):
            return tuple(reasons)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DamagedFileError("it is not a record of a failure")
