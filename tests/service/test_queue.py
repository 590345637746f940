"""The queue alone, with threads as callers and this thread as the model."""

import threading
import time
from concurrent.futures import Future

from service_fakes import wish
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.service.queue import WantedQueue


def _wishes(*keys: str) -> list[Wanted]:
    return [wish(key) for key in keys]


def _keys(wanted: list[Wanted]) -> list[str]:
    return [one.key for one in wanted]


def _complete(queue: WantedQueue, wanted: list[Wanted]) -> None:
    for one in wanted:
        queue.complete(one, Outcome(Status.STORED, one.key.upper()))


def _reasons(futures: "list[Future[Outcome]]") -> list[str]:
    return [future.result(0).reason for future in futures]


def test_full_batch_starts_at_once_and_keeps_the_order() -> None:
    queue = WantedQueue(max_batch=3, max_wait=60, max_queue=0)
    queue.add_caller(2)
    futures = queue.submit(_wishes("a", "b", "c", "d"))
    assert queue.wait()
    batch = queue.pull(3)
    assert _keys(batch) == ["a", "b", "c"]
    _complete(queue, batch)
    assert [future.done() for future in futures] == [True, True, True, False]
    queue.submit(_wishes("e"))  # now both callers wait: the rest starts without the 60 s
    assert queue.wait()
    rest = queue.pull(3)
    assert _keys(rest) == ["d", "e"]
    _complete(queue, rest)
    assert _reasons(futures) == ["A", "B", "C", "D"]


def test_a_working_model_takes_as_many_as_it_has_room_for() -> None:
    """`max_batch` once capped an engine that holds four batches: 64 came as 16, 16, 16, 16, each drained before the next."""
    queue = WantedQueue(max_batch=16, max_wait=60, max_queue=0)
    queue.submit(_wishes(*(f"k{n:02}" for n in range(64))))
    assert queue.wait()
    assert len(queue.pull(60)) == 60
    assert len(queue.pull(60)) == 4
    assert queue.pull(60) == []  # never waits


def test_partial_batch_waits_no_longer_than_max_wait() -> None:
    queue = WantedQueue(max_batch=8, max_wait=0.05, max_queue=0)
    queue.add_caller(2)  # the other one never asks
    start = time.monotonic()
    queue.submit(_wishes("a"))
    assert queue.wait()
    assert 0.04 <= time.monotonic() - start < 5


def test_equal_wishes_are_merged_while_pending_and_while_running() -> None:
    queue = WantedQueue(max_batch=8, max_wait=0, max_queue=8)
    first = queue.submit(_wishes("a", "a"))
    second = queue.submit(_wishes("a"))
    batch = queue.pull(8)
    third = queue.submit(_wishes("a"))
    assert queue.enqueue(_wishes("a")) == 1
    assert _keys(batch) == ["a"]
    _complete(queue, batch)
    assert _reasons([*first, *second, *third]) == ["A"] * 4
    assert queue.stats.merged == 4
    assert queue.stats.images == 1


def test_variants_of_one_image_are_not_merged() -> None:
    queue = WantedQueue(max_batch=8, max_wait=0, max_queue=8)
    queue.submit([wish("a", variant=0), wish("a", variant=1)])
    assert [one.variant for one in queue.pull(8)] == [0, 1]


def test_background_queue_is_bounded_and_yields_to_those_who_wait() -> None:
    queue = WantedQueue(max_batch=2, max_wait=0, max_queue=3)
    assert queue.enqueue(_wishes("a", "b", "c", "d", "e")) == 3
    assert queue.stats.dropped == 2
    queue.submit(_wishes("z", "b"))  # "b" is promoted
    assert _keys(queue.pull(2)) == ["z", "b"]
    assert _keys(queue.pull(2)) == ["a", "c"]


def test_what_is_in_work_can_fail_together() -> None:
    queue = WantedQueue(max_batch=2, max_wait=0, max_queue=3)
    running, waiting = queue.submit(_wishes("a", "b")), queue.submit(_wishes("c"))
    queue.pull(2)
    queue.fail("the device is gone")
    assert [future.result(0).status for future in running] == [Status.FAILED] * 2
    assert not waiting[0].done()


def test_close_wakes_the_model_thread() -> None:
    queue = WantedQueue(max_batch=2, max_wait=0, max_queue=3)
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(queue.wait()))
    thread.start()
    queue.close()
    thread.join(10)
    assert ended == [False]
    queue.submit(_wishes("a"))
    assert queue.pull(2) == []


def test_an_empty_request_is_done() -> None:
    assert WantedQueue(max_batch=2, max_wait=0, max_queue=3).submit([]) == []
