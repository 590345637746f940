"""The frames: what goes in comes out, and what is not a frame is refused without unpickling anything."""

import json
import pickle
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service_fakes import wish
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.images.reading import MAX_PIXELS
from sgid_transforms.service import protocol
from sgid_transforms.service.protocol import (
    outcome_header,
    outcomes_of,
    recv_frame,
    send_frame,
    wanted_header,
    wanted_of,
)

Pair = tuple[socket.socket, socket.socket]
IMAGES = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda size: torch.randint(0, 256, (3, *size), dtype=torch.uint8))
WANTED = st.builds(Wanted, st.text(max_size=20), st.integers(0, 2**30), IMAGES, st.none() | st.text(max_size=20))


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    left.settimeout(10)
    right.settimeout(10)
    with left, right:
        yield left, right


@settings(max_examples=30, deadline=None)
@given(st.lists(WANTED, max_size=5))
def test_wishes_arrive_as_they_were_sent(wanted: list[Wanted]) -> None:
    left, right = socket.socketpair()
    with left, right:
        send_frame(left, "generate", [one.image for one in wanted], items=wanted_header(wanted), number=7)
        frame = recv_frame(right)
    assert (frame.op, frame.header["number"]) == ("generate", 7)
    got = wanted_of(frame)
    assert [(one.key, one.variant, one.label) for one in got] == [(one.key, one.variant, one.label) for one in wanted]
    assert all(torch.equal(a.image, b.image) for a, b in zip(got, wanted, strict=True))


def test_outcomes_arrive_as_they_were_sent(pair: Pair) -> None:
    wanted = [wish("a"), wish("b"), wish("c")]
    outcomes = [Outcome(Status.STORED), Outcome(Status.FAILED, "why"), Outcome(Status.STORED, image=wanted[2].image)]
    send_frame(pair[0], "outcomes", [wanted[2].image], items=outcome_header(wanted, outcomes))
    got = outcomes_of(recv_frame(pair[1]), wanted)
    assert [(one.status, one.reason) for one in got] == [(one.status, one.reason) for one in outcomes]
    assert got[0].image is None
    assert torch.equal(got[2].image, wanted[2].image)


@pytest.mark.parametrize("other", [[wish("b"), wish("a")], [wish("a")], [wish("a"), wish("b", variant=1)]])
def test_an_answer_to_another_question_is_refused(pair: Pair, other: list[Wanted]) -> None:
    asked = [wish("a"), wish("b")]
    send_frame(pair[0], "outcomes", items=outcome_header(other, [Outcome(Status.STORED)] * len(other)))
    with pytest.raises(ValueError, match="answered a different request"):
        outcomes_of(recv_frame(pair[1]), asked)


def test_closed_connection_raises(pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(EOFError, match="closed"):
        recv_frame(pair[1])


def _frame(header: object, pixels: bytes = b"", magic: bytes = b"SGI3") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">4sIQ", magic, len(text), len(pixels)) + text + pixels


@pytest.mark.parametrize(
    "garbage",
    [
        pickle.dumps(print) + bytes(16),
        struct.pack(">4sIQ", b"SGI3", 1 << 31, 0),
        struct.pack(">4sIQ", b"SGI3", 2, 1 << 40),
        _frame({"op": "hello"}, magic=b"SGI1"),
        _frame(b"{bad}"),
        _frame(b"[" * 100_000),
        _frame([]),
        _frame({"items": []}),
        _frame({"op": "x", "items": [{"size": [1, 1]}]}, b"ab"),
        _frame({"op": "x", "items": [{"size": [-1, -1]}]}, b"abc"),
        _frame({"op": "x", "items": [{"size": [1.5, 2]}]}),
        _frame({"op": "x", "items": 7}),
        _frame({"op": "x", "items": ["a"]}),
    ],
)
def test_garbage_is_refused(pair: Pair, garbage: bytes) -> None:
    pair[0].sendall(garbage)
    with pytest.raises(ValueError):
        recv_frame(pair[1])


@pytest.mark.parametrize("item", [{}, {"key": 3, "variant": 0}, {"key": "a", "variant": True}, {"key": "a", "variant": "0"}])
def test_malformed_items_are_refused(pair: Pair, item: dict[str, object]) -> None:
    pair[0].sendall(_frame({"op": "generate", "items": [{**item, "size": [1, 1]}]}, b"abc"))
    with pytest.raises(ValueError, match="malformed item"):
        wanted_of(recv_frame(pair[1]))


def test_memory_grows_with_what_came_and_not_with_what_was_announced(pair: Pair) -> None:
    """16 bytes of a hostile client once made the service zero 4 GiB at once."""
    pair[0].sendall(_frame({"op": "generate", "items": [{"size": [1 << 14, 1 << 14]}]})[: struct.calcsize(">4sIQ")])
    header = json.dumps({"op": "generate", "items": [{"size": [5000, 5000]}]}).encode()
    left, right = socket.socketpair()
    with left, right:
        left.sendall(struct.pack(">4sIQ", b"SGI3", len(header), 75_000_000) + header + bytes(1000))
        left.shutdown(socket.SHUT_WR)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(EOFError):
            recv_frame(right)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10


def test_large_frames_arrive_whole(pair: Pair) -> None:
    image = torch.randint(0, 256, (3, 1500, 1500), dtype=torch.uint8)
    wanted = [Wanted("a", 0, image)]
    sender = threading.Thread(target=send_frame, args=(pair[0], "generate", [image]), kwargs={"items": wanted_header(wanted)})
    sender.start()
    assert torch.equal(wanted_of(recv_frame(pair[1]))[0].image, image)
    sender.join()


def test_photos_of_24_megapixels_fit_into_a_frame_and_the_largest_that_are_read_do_not():
    assert 3 * 6000 * 4000 <= protocol.PICTURE_BYTES < 3 * MAX_PIXELS  # photos of 24 megapixels


def test_a_service_process_starts_without_pytorch():
    """It would take seconds, and is needed with the first image only."""
    code = "import sys, sgid_transforms.service.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
