"""Frames between the service and its clients: a JSON header and raw pixels. Nothing is ever unpickled."""

import json
import math
import mmap
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sgid_transforms.building.wanted import Outcome, Status, Wanted

if TYPE_CHECKING:
    import torch

_PREFIX = struct.Struct(">4sIQ")  # magic, bytes of JSON, bytes of pixels
_MAGIC = b"SGI3"
_MAX_HEADER = 1 << 20
_SMALL = 1 << 16

PICTURE_BYTES = 72 << 20
"""Bytes of the largest picture that a service takes (25 megapixels); working on it takes four times as much memory."""

FRAME_BYTES = 1 << 24
"""Pixel bytes of one frame, unless a single image has more; a client splits larger requests into several frames."""

FRAME_ITEMS = 256
"""Maximum number of images in one frame."""


class Frame(NamedTuple):
    """One message: an operation, its details, and pixels."""

    op: str
    header: dict[str, Any]
    pixels: memoryview


def send_frame(
    sock: socket.socket,
    op: str,
    images: "Sequence[torch.Tensor]" = (),
    /,
    *,
    ask: Callable[[], object] = lambda: None,
    **header: Any,
) -> None:
    """Write one frame; the pixels of ``images``, uint8 ``(3, H, W)`` each, are not copied.

    Args:
        sock: The connection.
        op: The operation.
        images: Images whose pixels follow the header.
        ask: Called before pixels are sent; a client waits there until the service has room for them.
        header: Details.

    Raises:
        OSError: The peer is gone.
        ValueError: The frame is too large.
    """
    payloads = [image.detach().cpu().contiguous().numpy().data.cast("B") for image in images]
    text = json.dumps({**header, "op": op}, separators=(",", ":")).encode()
    size = sum(map(len, payloads))
    if len(text) > _MAX_HEADER or size > PICTURE_BYTES:
        raise ValueError(f"a frame of {len(text)} + {size} bytes is too large; ask for fewer or smaller images at a time")
    sock.sendall(_PREFIX.pack(_MAGIC, len(text), size) + text)
    if size:
        ask()
    for payload in payloads:
        sock.sendall(payload)


def recv_frame(sock: socket.socket, admit: Callable[[int], object] = lambda size: None) -> Frame:
    """Read one frame.

    Args:
        sock: The connection.
        admit: Called before pixels are read, with their size in bytes.

    Raises:
        EOFError: The peer closed the connection.
        ValueError: The bytes are not a frame of this protocol.
        OSError: The connection broke, or nothing came within the socket's timeout (``TimeoutError``).
    """
    magic, text_size, size = _PREFIX.unpack(_recv_exactly(sock, _PREFIX.size))
    if magic != _MAGIC or text_size > _MAX_HEADER or size > PICTURE_BYTES:
        raise ValueError("the peer does not speak this protocol (is it another version of sgid_transforms?)")
    try:
        header = json.loads(bytes(_recv_exactly(sock, text_size)))
        op = header.pop("op")
        sizes = [_bytes_of(one["size"]) for one in header.get("items", ()) if one.get("size") is not None]
    except (RecursionError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"the peer sent a malformed frame ({type(error).__name__})") from None
    if sum(sizes) != size:  # before any memory is allocated
        raise ValueError(f"a frame announced images of {sum(sizes)} bytes and carries {size}")
    if size:
        admit(size)
    return Frame(str(op), header, _recv_exactly(sock, size))


def wanted_header(wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
    """Wanted variants as a frame's ``items``, without their pixels."""
    return [{"key": one.key, "variant": one.variant, "label": one.label, "size": list(one.image.shape[1:])} for one in wanted]


def wanted_of(frame: Frame) -> list[Wanted]:
    """The reverse of `wanted_header`; the images share the frame's memory.

    Raises:
        ValueError: An item is malformed.
    """
    wanted = []
    for item, image in _with_pixels(frame):
        key, variant, label = item.get("key"), item.get("variant"), item.get("label")
        if not isinstance(key, str) or type(variant) is not int or not isinstance(label, str | None) or image is None:
            raise ValueError("the peer sent a malformed item")
        wanted.append(Wanted(key, variant, image, label))
    return wanted


def outcome_header(wanted: Sequence[Wanted], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as a frame's ``items``, each with the key and number of its variant."""
    return [
        {
            "key": one.key,
            "variant": one.variant,
            "status": outcome.status.value,
            "reason": outcome.reason,
            "made": outcome.made,
            "size": None if outcome.image is None else list(outcome.image.shape[1:]),
        }
        for one, outcome in zip(wanted, outcomes, strict=True)
    ]


def outcomes_of(frame: Frame, wanted: Sequence[Wanted]) -> list[Outcome]:
    """The reverse of `outcome_header`.

    Raises:
        ValueError: The frame does not answer exactly ``wanted``, so none of it may be used.
    """
    answers = list(_with_pixels(frame))
    if [(item.get("key"), item.get("variant")) for item, _ in answers] != [one.name for one in wanted]:
        raise ValueError("the service answered a different request")
    return [Outcome(Status(item["status"]), str(item["reason"]), image, bool(item["made"])) for item, image in answers]


def _with_pixels(frame: Frame) -> "list[tuple[Mapping[str, Any], torch.Tensor | None]]":
    found: list[tuple[Mapping[str, Any], Any]] = []
    offset = 0
    for item in frame.header.get("items", ()):
        if item.get("size") is None:
            found.append((item, None))
            continue
        height, width = item["size"]
        length = 3 * height * width
        import torch  # only where there are images: a service process must start without it

        pixels = torch.frombuffer(frame.pixels[offset : offset + length], dtype=torch.uint8)
        found.append((item, pixels.view(3, height, width)))
        offset += length
    return found


def _bytes_of(size: Any) -> int:
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError("the peer sent an image without a size")
    return 3 * math.prod(size)


def _recv_exactly(sock: socket.socket, size: int) -> memoryview:
    """Receive ``size`` bytes, in writable memory that tensors can share.

    The system allocates the pages of a memory map as they are written, so memory grows with the bytes received, not with the
    size announced. It also frees them at once; the heap would keep them.
    """
    view = memoryview(mmap.mmap(-1, size) if size > _SMALL else bytearray(size))
    got = 0
    while got < size:
        count = sock.recv_into(view[got:])
        if count == 0:
            raise EOFError("the connection was closed")
        got += count
    return view
