"""Where a variant lives below the root of its store, and which names are allowed.

Names are checked before any path is built from them, so no key or fingerprint can lead out of the store.
"""

import re
from typing import NamedTuple, Protocol

from sgid_transforms.errors import StoreError

EXTENSIONS = (".png", ".jpg", ".webp")
FAILURE_SUFFIX = ".failed.json"
QUARANTINE = "quarantine"
TEMPORARY = "tmp"
ORPHAN_AGE = 3600.0
"""Seconds after which a temporary file of another host counts as left behind."""

_FINGERPRINT = re.compile(r"[0-9a-z][0-9a-z_-]{3,63}")
_KEY = re.compile(r"[0-9a-f]{8,64}")
_FILE = re.compile(r"([0-9a-f]{8,64})-(0|[1-9][0-9]{0,8})(\.png|\.jpg|\.webp|\.failed\.json)")
_SHARD = re.compile(r"[0-9a-f]{2}")
_MAX_VARIANT = 999_999_999


class HasFingerprint(Protocol):
    """What a store needs of a recipe: its fingerprint and the format that its images are stored in."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def image_format(self) -> str: ...


class FileName(NamedTuple):
    """A file name of the store, taken apart."""

    key: str
    variant: int
    suffix: str

    @property
    def is_failure(self) -> bool:
        return self.suffix == FAILURE_SUFFIX


def check_fingerprint(recipe: HasFingerprint | str) -> str:
    """The fingerprint of ``recipe``, refused when it could not be a folder name of a store."""
    fingerprint = recipe if isinstance(recipe, str) else recipe.fingerprint
    if not is_fingerprint(fingerprint):
        raise StoreError(
            f"fingerprint {_shown(fingerprint)} is not 4 to 64 of a-z, 0-9, - and _; pass a Recipe or its .fingerprint"
        )
    return fingerprint


def is_fingerprint(name: str) -> bool:
    """Whether ``name`` can be the folder of one recipe."""
    return _FINGERPRINT.fullmatch(name) is not None and name != QUARANTINE


def is_shard(name: str) -> bool:
    """Whether ``name`` can be one of a recipe's 256 folders."""
    return _SHARD.fullmatch(name) is not None


def stem(key: str, variant: int) -> str:
    """``<k0k1>/<key>-<variant>``: the path of a variant below its recipe's folder, without the extension."""
    # The two checks run on every look-up of a training: keep them to one regular expression and one comparison.
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise StoreError(
            f"key {_shown(key)} is not 8 to 64 lowercase hex digits; use image_key(image), or a hash of your own id"
        )
    if type(variant) is not int or not 0 <= variant <= _MAX_VARIANT:
        raise StoreError(f"variant {_shown(variant)} is not a whole number from 0 to {_MAX_VARIANT}")
    return f"{key[:2]}/{key}-{variant}"


def parse(shard: str, name: str) -> FileName | None:
    """Take a file name apart; ``None`` for a name that no store writes into the folder ``shard``."""
    found = _FILE.fullmatch(name)
    if found is None or not name.startswith(shard):
        return None
    return FileName(found[1], int(found[2]), found[3])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
