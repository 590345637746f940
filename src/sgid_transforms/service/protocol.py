"""Frames between the service and its clients: a JSON header and raw bytes. Nothing is ever unpickled."""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_PREFIX = struct.Struct(">4sIQ")  # magic, bytes of JSON, bytes of payload
_MAGIC = b"SGI1"
_MAX_HEADER = 1 << 26
_MAX_PAYLOAD = 1 << 32


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work, or its result: a name, a JSON-able description and raw bytes (uint8 pixels, or none).

    Items with equal ``ident`` are the same work: while one is in flight, the others wait for its result.
    """

    ident: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes | bytearray | memoryview = b""


def send_frame(sock: socket.socket, op: str, items: Sequence[Item] = (), **header: Any) -> None:
    """Write one frame; the payloads are not copied.

    Raises:
        OSError: The peer is gone.
    """
    head = dict(header, op=op, items=[[item.ident, len(item.payload), dict(item.meta)] for item in items])
    text = json.dumps(head, separators=(",", ":")).encode()
    size = sum(len(item.payload) for item in items)
    if len(text) > _MAX_HEADER or size > _MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(text)} + {size} bytes is too large; ask for fewer images at a time")
    sock.sendall(_PREFIX.pack(_MAGIC, len(text), size) + text)
    for item in items:
        if len(item.payload):
            sock.sendall(item.payload)


def recv_frame(sock: socket.socket) -> tuple[str, dict[str, Any], list[Item]]:
    """Read one frame as ``(op, header, items)``.

    Raises:
        EOFError: The peer closed the connection.
        ValueError: The bytes are not a frame of this protocol.
        OSError: The connection broke, or nothing came within the socket's timeout (``TimeoutError``).
    """
    magic, text_size, size = _PREFIX.unpack(_recv_exactly(sock, _PREFIX.size))
    if magic != _MAGIC or text_size > _MAX_HEADER or size > _MAX_PAYLOAD:
        raise ValueError("the peer does not speak this protocol (is it another version of sgid_transforms?)")
    header = json.loads(_recv_exactly(sock, text_size))
    body = memoryview(_recv_exactly(sock, size))
    items, offset = [], 0
    for ident, length, meta in header.pop("items"):
        items.append(Item(str(ident), meta, body[offset : offset + length]))
        offset += length
    if offset != size:
        raise ValueError(f"a frame announced {offset} bytes of pixels and carried {size}")
    return str(header.pop("op")), header, items


def _recv_exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)  # writable, so that a tensor can be laid over it without a copy
    view, got = memoryview(buffer), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if count == 0:
            raise EOFError("the connection was closed")
        got += count
    return buffer
