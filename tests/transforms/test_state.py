"""Shared counters and live settings over threads, forks, spawns and pickles."""

import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sgid_transforms.errors import ServiceError
from sgid_transforms.transforms.state import SharedState

NAMES = ("seen", "hits")


def _count(state: SharedState, times: int) -> None:
    for _ in range(times):
        state.add(seen=1)
    state.add(hits=2)


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
    state.add(seen=1)
    other = duplicate(state)  # type: ignore[operator]
    assert other.settings()["p"] == 0.75
    assert other.totals()["seen"] == 0
    other.publish(p=0.1)
    assert state.settings()["p"] == 0.75


def test_a_pickle_outlives_its_origin() -> None:
    state = SharedState(NAMES, {"p": 0.5})
    data, folder = pickle.dumps(state), state._path
    del state
    gc.collect()
    assert not os.path.exists(folder)
    assert pickle.loads(data).settings()["p"] == 0.5  # noqa: S301


def test_nothing_is_left_behind() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        SharedState(NAMES, {}).add(seen=1)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def _by_pickle(state: SharedState) -> SharedState:
    return pickle.loads(pickle.dumps(state))  # noqa: S301


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        _by_pickle,
        lambda state: copy.deepcopy(copy.deepcopy(state)),
        lambda state: _by_pickle(copy.deepcopy(state)),
        lambda state: copy.deepcopy([state, {"again": state}])[1]["again"],
    ],
    ids=["deepcopy", "pickle", "copy of a copy", "pickled copy", "shared in a structure"],
)
def test_a_copy_sees_the_services_of_its_origin(duplicate: object) -> None:
    """Copying a data set, to give its splits transforms of their own, once hid the service that was started afterwards."""
    state = SharedState(NAMES, {"p": 0.5})
    other = duplicate(state)  # type: ignore[operator]
    assert other.settings().get("address") is None
    state.register("first")
    assert other.settings()["address"] == "first"
    other.register("own")
    assert (state.settings()["address"], other.settings()["address"]) == ("first", "own")
    other.unregister("own")
    assert other.settings()["address"] == "first"


@pytest.mark.parametrize("order", list(itertools.permutations(["first", "second", "third"])))
def test_a_service_that_stops_takes_its_own_address_only(order: tuple[str, ...]) -> None:
    """Nested services, and such that overlap."""
    state, alive = SharedState(NAMES, {}), ["first", "second", "third"]
    for address in alive:
        state.register(address)
    for address in order:
        assert state.settings()["address"] == alive[-1]
        state.unregister(address)
        alive.remove(address)
    assert state.settings()["address"] is None


def test_settings_reach_processes_after_the_folder_was_cleaned_away() -> None:
    state = SharedState(NAMES, {"p": 0.0})
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    worker = context.Process(target=_obey, args=(state, there))
    worker.start()
    shutil.rmtree(state._path)
    state.publish(p=1.0)
    here.send("p")
    assert here.recv() == 1.0
    here.send("end")
    worker.join()
    here.close()
    there.close()


def test_a_fork_while_other_threads_hold_the_lock_leaves_nobody_waiting() -> None:
    """A monitor that calls stats() while a DataLoader forks once gave every worker a lock that was never released."""
    state = SharedState(NAMES, {"p": 0.5})
    done = threading.Event()

    def monitor() -> None:
        while not done.is_set():
            state.totals()
            state.publish(p=0.25)

    threads = [threading.Thread(target=monitor) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        context = multiprocessing.get_context("fork")
        for _ in range(30):
            workers = [context.Process(target=_count, args=(state, 5)) for _ in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(20)
                assert worker.exitcode == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert state.totals() == {"seen": 300, "hits": 120}


def test_publishing_from_many_processes_loses_no_setting() -> None:
    state = SharedState(NAMES, {})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish, args=(state, f"s{number}")) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {name: state.settings()[name] for name in ("s0", "s1", "s2", "s3")} == dict.fromkeys(("s0", "s1", "s2", "s3"), 49)


def _publish(state: SharedState, name: str) -> None:
    for value in range(50):
        state.publish(**{name: value})


def test_settings_that_are_too_long_are_refused_and_change_nothing() -> None:
    state = SharedState(NAMES, {"p": 0.5})
    with pytest.raises(ServiceError, match="can be shared"):
        state.publish(p={f"class {number}": 0.5 for number in range(10_000)})
    assert state.settings()["p"] == 0.5


def test_folders_of_killed_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker = multiprocessing.get_context("fork").Process(target=_die_with_a_state)
    worker.start()
    worker.join()
    assert len(os.listdir(tmp_path)) == 1
    state = SharedState(NAMES, {})
    assert os.listdir(tmp_path) == [os.path.basename(state._path)]


def _die_with_a_state() -> None:
    state = SharedState(NAMES, {})
    state.add(seen=1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ServiceError, match=r"has no room for what processes share .*; set TMPDIR"):
        SharedState(NAMES, {})
