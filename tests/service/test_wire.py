"""The frames: what goes in comes out, and what is not a frame is refused without unpickling anything."""

import pickle
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgid_transforms.service.protocol import Item, recv_frame, send_frame

_META = st.dictionaries(st.text(max_size=5), st.text() | st.none())


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.settimeout(10)
    right.settimeout(10)
    with left, right:
        yield left, right


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text() | st.none()), st.binary(max_size=99))
    )
)
def test_round_trip(work: list[tuple[str, dict[str, str | None], bytes]]) -> None:
    left, right = socket.socketpair()
    with left, right:
        send_frame(left, "generate", [Item(*one) for one in work], extra=1)
        op, header, items = recv_frame(right)
    assert (op, header) == ("generate", {"extra": 1})
    assert [(item.ident, item.meta, bytes(item.payload)) for item in items] == work


def test_payloads_are_writable_so_that_tensors_can_share_them(pair: tuple[socket.socket, socket.socket]) -> None:
    send_frame(pair[0], "generate", [Item("a", {}, b"xyz")])
    payload = recv_frame(pair[1])[2][0].payload
    assert isinstance(payload, memoryview)
    assert not payload.readonly


def test_closed_connection_raises(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(EOFError, match="closed"):
        recv_frame(pair[1])


@pytest.mark.parametrize(
    "garbage",
    [
        pickle.dumps(print) + bytes(16),
        struct.pack(">4sIQ", b"SGI1", 1 << 31, 0),
        struct.pack(">4sIQ", b"SGI1", 2, 1 << 40),
        struct.pack(">4sIQ", b"SGI1", 5, 0) + b"{bad}",
        struct.pack(">4sIQ", b"SGI1", 40, 2) + b'{"op":"x","items":[["a",1,{}]]}         ' + b"ab",
    ],
)
def test_garbage_is_refused(pair: tuple[socket.socket, socket.socket], garbage: bytes) -> None:
    pair[0].sendall(garbage)
    with pytest.raises(ValueError):
        recv_frame(pair[1])
