"""The batcher alone, with threads as callers and this thread as the model."""

import threading
import time

from sgid_transforms.service.protocol import Item
from sgid_transforms.service.queue import Batcher


def _items(*names: str) -> list[Item]:
    return [Item(name) for name in names]


def _idents(batch: list) -> list[str]:
    return [entry.item.ident for entry in batch]


def test_full_batch_starts_at_once_and_keeps_the_order() -> None:
    batcher = Batcher(max_batch=3, max_wait=60, max_queue=0)
    batcher.add_caller(2)
    request = batcher.submit(_items("a", "b", "c", "d"))
    batch = batcher.next_batch()
    assert _idents(batch) == ["a", "b", "c"]
    batcher.complete(batch, _items("A", "B", "C"))
    assert not request.wait(0)
    batcher.submit(_items("e"))  # now both callers wait: the rest starts without the 60 s
    rest = batcher.next_batch()
    assert _idents(rest) == ["d", "e"]
    batcher.complete(rest, _items("D", "E"))
    assert request.wait(0)
    assert [result.ident for result in request.results] == ["A", "B", "C", "D"]


def test_partial_batch_waits_no_longer_than_max_wait() -> None:
    batcher = Batcher(max_batch=8, max_wait=0.05, max_queue=0)
    batcher.add_caller(2)  # the other one never asks
    start = time.monotonic()
    batcher.submit(_items("a"))
    assert _idents(batcher.next_batch()) == ["a"]
    assert 0.04 <= time.monotonic() - start < 5


def test_equal_items_are_merged_while_pending_and_while_running() -> None:
    batcher = Batcher(max_batch=8, max_wait=0, max_queue=8)
    first = batcher.submit(_items("a", "a"))
    second = batcher.submit(_items("a"))
    batch = batcher.next_batch()
    third = batcher.submit(_items("a"))
    assert batcher.enqueue(_items("a")) == 1
    assert _idents(batch) == ["a"]
    batcher.complete(batch, _items("done"))
    assert all(request.wait(0) for request in (first, second, third))
    assert [result.ident for result in first.results] == ["done", "done"]
    assert batcher.stats.merged == 4
    assert batcher.stats.images == 1


def test_background_queue_is_bounded_and_yields_to_those_who_wait() -> None:
    batcher = Batcher(max_batch=2, max_wait=0, max_queue=3)
    assert batcher.enqueue(_items("a", "b", "c", "d", "e")) == 3
    assert batcher.stats.dropped == 2
    batcher.submit(_items("z", "b"))  # "b" is promoted
    assert _idents(batcher.next_batch()) == ["z", "b"]
    assert _idents(batcher.next_batch()) == ["a", "c"]


def test_close_wakes_the_model_thread() -> None:
    batcher = Batcher(max_batch=2, max_wait=0, max_queue=3)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(batcher.next_batch()))
    thread.start()
    batcher.close()
    thread.join(10)
    assert ended == [None]


def test_an_empty_request_is_done() -> None:
    assert Batcher(max_batch=2, max_wait=0, max_queue=3).submit([]).wait(0)
