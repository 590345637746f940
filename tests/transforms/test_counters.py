"""Shared counters and live settings over threads, forks, spawns and pickles."""

import copy
import gc
import multiprocessing
import os
import pickle
import threading
from multiprocessing.connection import Connection

import pytest

from sgid_transforms.transforms.state import SharedState, try_lock

NAMES = ("seen", "hits")


def _count(state: SharedState, times: int) -> None:
    for _ in range(times):
        state.add("seen")
    state.add("hits", 2)


def _obey(state: SharedState, pipe: Connection) -> None:
    while pipe.recv() == "p":
        pipe.send(state.settings()["p"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_counts_of_all_processes_add_up(method: str) -> None:
    context = multiprocessing.get_context(method)
    state = SharedState(NAMES, {"p": 0.5})
    _count(state, 10)
    workers = [context.Process(target=_count, args=(state, 100)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert state.totals() == {"seen": 210, "hits": 6}


def test_rows_of_ended_processes_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgid_transforms.transforms.state._ROWS", 4)
    state = SharedState(NAMES, {})
    for _ in range(5):
        worker = multiprocessing.get_context("fork").Process(target=_count, args=(state, 3))
        worker.start()
        worker.join()
    _count(state, 1)
    assert state.totals() == {"seen": 16, "hits": 12}


def test_threads_lose_no_count() -> None:
    state = SharedState(NAMES, {})
    threads = [threading.Thread(target=_count, args=(state, 500)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.totals()["seen"] == 2000


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_live_process_sees_changed_settings(method: str) -> None:
    context = multiprocessing.get_context(method)
    state = SharedState(NAMES, {"p": 0.5})
    here, there = context.Pipe()
    worker = context.Process(target=_obey, args=(state, there))
    worker.start()
    seen = []
    for p in (0.5, 0.25, 1.0):
        state.publish(p=p)
        here.send("p")
        seen.append(here.recv())
    here.send("end")
    worker.join()
    here.close()
    there.close()
    assert seen == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])  # noqa: S301
def test_a_copy_in_the_same_process_is_independent(duplicate: object) -> None:
    state = SharedState(NAMES, {"p": 0.5})
    state.publish(p=0.75)
    state.add("seen")
    other = duplicate(state)  # type: ignore[operator]
    assert other.settings() == {"p": 0.75}
    assert other.totals()["seen"] == 0
    other.publish(p=0.1)
    assert state.settings() == {"p": 0.75}


def test_a_pickle_outlives_its_origin() -> None:
    state = SharedState(NAMES, {"p": 0.5})
    data, folder = pickle.dumps(state), state._path
    del state
    gc.collect()
    assert not os.path.exists(folder)
    assert pickle.loads(data).settings() == {"p": 0.5}  # noqa: S301


def test_nothing_is_left_behind() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        SharedState(NAMES, {}).add("seen")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_excludes_until_its_descriptor_is_closed(tmp_path: object) -> None:
    path = f"{tmp_path}/lock"
    descriptor = try_lock(path)
    assert descriptor is not None
    assert try_lock(path) is None
    os.close(descriptor)
    again = try_lock(path)
    assert again is not None
    os.close(again)
    assert try_lock(f"{tmp_path}/gone/lock") is None
