"""Why a variant could not be made: a small JSON file in the variant's place."""

import json
from collections.abc import Sequence

from sgid_transforms.variants.container import DamagedFileError

MAX_SIZE = 2**18
_MAX_REASONS = 32
_MAX_LENGTH = 1000


def pack(reasons: Sequence[str]) -> bytes:
    """The file's bytes; more than 32 reasons of 1000 characters each are cut."""
    if isinstance(reasons, str):
        reasons = (reasons,)
    return json.dumps({"reasons": [str(reason)[:_MAX_LENGTH] for reason in reasons[:_MAX_REASONS]]}).encode("ascii")


def unpack(data: bytes) -> tuple[str, ...]:
    """The reasons.

    Raises:
        DamagedFileError: the bytes are not what ``pack`` makes.
    """
    try:
        reasons = json.loads(data)["reasons"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedFileError("it is no record of a failure") from None
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        raise DamagedFileError("it is no record of a failure")
    return tuple(reasons)
