"""One variant file: an ordinary image file, then a footer with the provenance and a digest.

Layout::

    image    a complete PNG, JPEG or WebP file; viewers stop at its own end and ignore the rest
    json     the provenance, ASCII JSON
    length   4 bytes, little endian: size of ``json``
    magic    8 bytes: ``SGIDvar1``
    digest   32 bytes: SHA-256 of the name ``<fingerprint>/<k0k1>/<key>-<variant>`` followed by all bytes before the digest

The name is part of the digest, so a file that was renamed or copied to another variant's place is found out as well.
"""

import hashlib
import struct

from sgid_transforms.errors import StoreError

MAGIC = b"SGIDvar1"
MAX_JSON = 2**20
MAX_FILE = 2**28
_TAIL = struct.Struct("<I8s")
_DIGEST = 32
_FOOTER = _TAIL.size + _DIGEST


class DamagedFileError(ValueError):
    """A file in the store is not what a store wrote there; the message says what is wrong."""


def pack(image: bytes, provenance: bytes, name: str) -> bytes:
    """The bytes of a variant file (see the layout above)."""
    if len(provenance) > MAX_JSON:
        raise StoreError(f"a provenance of {len(provenance)} bytes is too long; {MAX_JSON} is the limit")
    body = b"".join((image, provenance, _TAIL.pack(len(provenance), MAGIC)))
    return body + _digest(body, name)


def unpack(data: bytes, name: str) -> tuple[memoryview, int]:
    """Check a variant file.

    Returns:
        ``data`` without its digest, as a view (a copy would cost as much as reading the file), and the offset at which the
        image ends and the JSON begins.

    Raises:
        DamagedFileError: foreign, cut off, changed, or meant for another name.
    """
    if len(data) <= _FOOTER:
        raise DamagedFileError(f"{len(data)} bytes are too few for a variant")
    body = memoryview(data)[:-_DIGEST]
    length, magic = _TAIL.unpack_from(body, len(body) - _TAIL.size)
    if magic != MAGIC:
        raise DamagedFileError("it has no footer: cut off, or not written by a variant store")
    if _digest(body, name) != data[-_DIGEST:]:
        raise DamagedFileError("its digest does not fit: changed, or renamed")
    image_end = len(body) - _TAIL.size - length
    if image_end <= 0:
        raise DamagedFileError("its footer is longer than the file")
    return body, image_end


def provenance_of(body: memoryview, image_end: int) -> bytes:
    """The JSON part of what ``unpack`` returned."""
    return bytes(body[image_end : len(body) - _TAIL.size])


def _digest(body: bytes | memoryview, name: str) -> bytes:
    digest = hashlib.sha256(name.encode("ascii"))
    digest.update(body)
    return digest.digest()
