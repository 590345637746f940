"""The service as real processes, under the faults that it must survive."""

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from service_fakes import batches, fake_factory, refusing_factory, wish
from sgid_transforms import CaptionRecord, CaptionStore, Recipe, SGIDAugment, image_key
from sgid_transforms.building.wanted import Outcome, Status, Wanted
from sgid_transforms.errors import GenerationError, ModelLoadError, ServiceError
from sgid_transforms.files import try_lock
from sgid_transforms.service import GenerationService, ServiceClient
from sgid_transforms.service.process import job_rendezvous
from sgid_transforms.service.protocol import recv_frame


def _until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for temporary files whose path leaves room for a socket's."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _value(client: ServiceClient, key: str, value: int = 7, size: int = 4) -> int:
    """Ask for the variant of an image of one colour; the fake answers with the inverted colour."""
    [outcome] = client.generate([wish(key, value, size=size)])
    assert outcome.status is Status.STORED
    return 255 - int(outcome.image.unique())


def _work(client: ServiceClient, ident: str, pipe: Connection) -> None:
    """A worker: ask once, report the payload or the error and when it came, then ask again when told the address."""
    while True:
        try:
            pipe.send((time.time(), _value(client, ident)))
        except ServiceError as error:
            pipe.send((time.time(), error))
        address = pipe.recv()
        if address is None:
            return
        client, ident = ServiceClient(address), f"again-{ident}"


def _workers(
    client: ServiceClient, idents: list[str], methods: list[str]
) -> list[tuple[multiprocessing.process.BaseProcess, Connection]]:
    started = []
    for ident, method in zip(idents, methods, strict=True):
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(client, ident, there))
        process.start()
        there.close()
        started.append((process, here))
    return started


def test_killed_service_wakes_every_worker_and_a_restart_resumes(tmp_path: Path) -> None:
    with GenerationService(fake_factory(tmp_path, room=4), max_batch=4, max_wait=30) as service:
        service.client.generate([])  # a connection of the parent that the forked workers inherit
        workers = _workers(service.client, [f"slow{n}" for n in range(4)], ["fork", "fork", "spawn", "spawn"])
        _until(lambda: sum(map(len, batches(tmp_path))) == 4 or service.client.stats()["images"] == 4)
        killed = time.time()
        os.kill(service.pid, signal.SIGKILL)
        for _, pipe in workers:
            assert pipe.poll(5)
            when, error = pipe.recv()
            assert isinstance(error, ServiceError)
            assert "sgid.serve" in str(error)
            print(f"a waiting worker knew after {1000 * (when - killed):.0f} ms that the service was killed")
            assert when - killed < 5
        with pytest.raises(ServiceError):  # the socket of a dead service refuses at once
            service.client.generate([wish("a")])
        assert not service.alive
        service.restart()
        Path(tmp_path, "release").touch()
        for process, pipe in workers:
            pipe.send(service.client.address)
            assert pipe.poll(20)
            assert pipe.recv()[1] == 7
            pipe.send(None)
            process.join()
            pipe.close()


def test_worker_killed_in_mid_request_leaves_the_service_healthy(tmp_path: Path) -> None:
    with GenerationService(fake_factory(tmp_path), max_wait=0) as service:
        [(process, pipe)] = _workers(service.client, ["slow"], ["fork"])
        _until(lambda: batches(tmp_path) == [["slow"]])
        process.kill()
        process.join()
        pipe.close()
        Path(tmp_path, "release").touch()
        assert _value(service.client, "next") == 7


def test_exception_reaches_exactly_the_callers_of_its_batch(tmp_path: Path) -> None:
    outcome: dict[str, list[Outcome]] = {}

    def ask(*idents: str) -> None:
        outcome[idents[0]] = service.client.generate([wish(ident) for ident in idents])

    with GenerationService(fake_factory(tmp_path, room=2), max_batch=2) as service:
        threads = [threading.Thread(target=ask, args=("slow",))]
        threads[0].start()
        _until(lambda: batches(tmp_path) == [["slow"]])
        # Held up behind it, the two others come in any order, and each fills a batch of its own.
        for idents in (("fail", "beside"), ("fine", "too")):
            threads.append(threading.Thread(target=ask, args=idents))
            threads[-1].start()
        Path(tmp_path, "release").touch()
        for thread in threads:
            thread.join()
    assert [(one.status, one.reason) for one in outcome["fail"]] == [(Status.FAILED, "ValueError: cannot do fail")] * 2
    assert {one.status for one in outcome["fine"] + outcome["slow"]} == {Status.STORED}


def test_hung_service_is_noticed(tmp_path: Path) -> None:
    with GenerationService(fake_factory()) as service:
        client = ServiceClient(service.client.address, patience=0.3)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServiceError, match=r"no sign of life for 0\.3 s"):
                client.generate([wish("a")])
        finally:
            os.kill(service.pid, signal.SIGCONT)


def test_a_generator_that_never_returns_meets_the_deadline_and_is_told_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sgid_transforms.files.QUIET_SECONDS", 0.3)
    with GenerationService(fake_factory(tmp_path)) as service:
        assert _value(service.client, "warm") == 7  # its first images make the process import torch
        caplog.clear()
        client = ServiceClient(service.client.address, timeout=1.5)
        start = time.monotonic()
        with pytest.raises(ServiceError, match=r"waited for 2 variants from the generation service at .* for timeout=1\.5 s"):
            client.generate([wish("slow"), wish("slow2")])
        assert 1.4 < time.monotonic() - start < 5
        told = [record.message for record in caplog.records]
        assert len(told) == 1
        assert told[0].startswith(
            f"waiting for 2 variants from the generation service at {client.address}: nothing has happened"
        )
        Path(tmp_path, "release").touch()
        assert _value(client, "a") == 7  # the late answers went with their connection


def test_a_stopped_service_meets_the_deadline_whatever_is_asked(tmp_path: Path) -> None:
    with GenerationService(fake_factory()) as service:
        assert _value(service.client, "warm") == 7
        client = ServiceClient(service.client.address, timeout=0.5)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            for size in (4, 2000):  # the larger one fills the socket's buffer
                with pytest.raises(ServiceError, match=r"timeout=0\.5 s|does not read"):
                    client.generate([wish("b", size=size)])
        finally:
            os.kill(service.pid, signal.SIGCONT)


def test_a_long_batch_is_no_reason_to_give_up(tmp_path: Path) -> None:
    with GenerationService(fake_factory(seconds=2.5)) as service:
        assert _value(service.client, "first") == 7
        client = ServiceClient(service.client.address, patience=2)
        assert _value(client, "a") == 7


def test_64_identical_requests_generate_once(tmp_path: Path) -> None:
    with GenerationService(fake_factory(tmp_path), max_wait=0.2) as service:
        results: list[int] = []
        client = service.client
        threads = [threading.Thread(target=lambda: results.append(_value(client, "slow"))) for _ in range(64)]
        for thread in threads:
            thread.start()
        _until(lambda: service.client.stats()["merged"] == 63)
        Path(tmp_path, "release").touch()
        for thread in threads:
            thread.join()
    assert batches(tmp_path) == [["slow"]]
    assert results == [7] * 64


def test_batches_of_four_busy_workers_are_filled(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for step in range(20):
            # 6 to 10 images: what the gate lets through of 16
            client.generate([wish(f"{number}-{step}-{n}") for n in range(6 + (number + step) % 5)])

    with GenerationService(fake_factory(tmp_path, seconds=0.005), max_batch=16) as service:
        client = service.client
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = service.client.stats()
    assert stats["images"] == 640
    assert stats["images"] / stats["batches"] / stats["max_batch"] >= 0.8


def test_enqueue_never_waits_and_counts_drops(tmp_path: Path) -> None:
    with GenerationService(fake_factory(tmp_path, room=2), max_batch=2, max_wait=0, max_queue=3) as service:
        client = service.client
        assert _value(client, "warm") == 7
        start = time.monotonic()
        dropped = client.enqueue([wish(f"slow{n}") for n in range(10)])
        _until(lambda: client.enqueue([wish("more")]) >= 5, seconds=10)  # told at a later call
        assert time.monotonic() - start < 5
        assert dropped == 0
        assert client.full
        Path(tmp_path, "release").touch()
        _until(lambda: service.client.stats()["images"] >= 4)


def test_enqueue_does_not_wait_for_a_service_that_does_not_read(tmp_path: Path) -> None:
    """A socket takes no more than some hundred kilobytes; a large image once held up its worker until the service read it."""
    with GenerationService(fake_factory(tmp_path), max_wait=0) as service:
        client = service.client
        os.kill(service.pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert client.enqueue([wish("large", size=2000)]) == 0
            assert client.enqueue([wish("more")]) == 1  # told at once, as the first is still under way
            assert time.monotonic() - start < 5
        finally:
            os.kill(service.pid, signal.SIGCONT)
        _until(lambda: batches(tmp_path) == [["large"]])
        _until(lambda: client.enqueue([wish("later")]) == 0)
        os.kill(service.pid, signal.SIGKILL)
        with pytest.raises(ServiceError, match="is gone"):
            _until(lambda: client.enqueue([wish("too late")]) < 0)


def test_an_interrupted_question_leaves_no_answer_behind(tmp_path: Path) -> None:
    """After Ctrl-C in a notebook, the client once kept its link: answers shifted by one, and cats came back for dogs."""
    with GenerationService(fake_factory(tmp_path), max_wait=0) as service:
        client = service.client
        _until(lambda: _value(client, "before") == 7)
        interrupt = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            client.generate([wish("slow", 1)])
        interrupt.join()
        Path(tmp_path, "release").touch()
        for value in range(20, 30):
            assert _value(client, f"next{value}", value) == value


def test_a_service_for_another_recipe_refuses(tmp_path: Path) -> None:
    with GenerationService(fake_factory(), recipe="01aa") as service:
        other = ServiceClient(service.client.address, recipe="01bb")
        with pytest.raises(ServiceError, match="this service makes variants of recipe 01aa, not of 01bb"):
            other.generate([wish("a")])
        assert _value(service.client, "a") == 7


def test_a_shortage_of_descriptors_does_not_deafen_the_service() -> None:
    """The accept loop once ended at its first EMFILE: "alive", and deaf for good."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        service = GenerationService(fake_factory()).start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with service:
        many = [socket.socket(socket.AF_UNIX) for _ in range(80)]
        for one in many:
            one.connect(service.client.address)
        for one in many:
            one.close()
        assert _value(ServiceClient(service.client.address, patience=10), "a") == 7
        assert service.alive


def test_hostile_frames_end_their_own_connection_only(tmp_path: Path) -> None:
    with GenerationService(fake_factory()) as service:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"SGI3" + bytes(12) + b"x", bytes(100)):
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(service.client.address)
                one.sendall(data)
        assert _value(service.client, "a") == 7


def _send(address: str, op: str, size: tuple[int, int], pixels: bytes) -> socket.socket:
    """A client that says what it wants and sends these bytes, whatever it is told."""
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(10)
    one.connect(address)
    item = {"key": "ab" * 16, "variant": len(pixels), "label": None, "size": list(size)}
    header = json.dumps({"op": op, "items": [item]}).encode()
    one.sendall(struct.pack(">4sIQ", b"SGI3", len(header), 3 * size[0] * size[1]) + header)
    with contextlib.suppress(OSError):  # dropped meanwhile, as it may be
        one.sendall(pixels)
    return one


def test_memory_is_bounded_for_all_clients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 12 clients once had 64 MiB of its own; here they announce 16 MiB, send most of it, and fall silent."""
    with GenerationService(fake_factory()) as service:
        service.client.generate([wish("warm")])
        resident = Path(f"/proc/{service.pid}/statm")
        before = int(resident.read_text().split()[1])
        address, side = service.client.address, 2364  # 16 MiB
        with ThreadPoolExecutor(12) as pool:
            silent = [pool.submit(_send, address, "generate", (side, side), bytes(15 << 20)) for _ in range(12)]
            client = ServiceClient(address, timeout=30)
            assert [_value(client, f"honest{number}", number, 600) for number in range(3)] == [0, 1, 2]
            grown = (int(resident.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE")
            assert grown < 130 << 20
            for one in silent:
                one.result().close()


def test_clients_that_announce_the_largest_pictures_and_send_nothing_hold_up_others_for_seconds_only() -> None:
    with GenerationService(fake_factory()) as service:
        silent = [_send(service.client.address, "generate", (5000, 5000), bytes(1 << 20)) for _ in range(2)]
        assert _value(ServiceClient(service.client.address, timeout=10), "small", 5, 600) == 5
        for one in silent:
            one.close()
        picture = torch.zeros(3, 5000, 5000, dtype=torch.uint8)
        assert service.client.generate([Wanted("large", 0, picture)])[0].status is Status.STORED


def test_a_silent_client_keeps_its_room_while_nobody_waits() -> None:
    with GenerationService(fake_factory()) as service:
        service.client.generate([wish("warm")])
        with _send(service.client.address, "enqueue", (100, 100), bytes(29_999)) as one:
            assert _value(service.client, "a", 1, 600) == 1
            one.sendall(b"x")
            assert [recv_frame(one).op for _ in range(2)] == ["go", "queued"]


def test_room_waited_for_longer_than_patience_is_no_reason_to_give_up(tmp_path: Path) -> None:
    """Signs of life reach a client that may not send yet."""
    with GenerationService(fake_factory(tmp_path)) as service:
        client = ServiceClient(service.client.address, patience=4)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(client.generate, [wish("slow", 1, size=5000)])
            second = pool.submit(client.generate, [wish("late", 2, size=5000)])
            with pytest.raises(TimeoutError):
                second.result(6)
            (tmp_path / "release").touch()
            assert [one.result(30)[0].status for one in (first, second)] == [Status.STORED] * 2


def test_a_rendezvous_in_a_missing_folder_is_made(tmp_path: Path) -> None:
    """It once looped for ever: "no folder" looked like "held by somebody else"."""
    with GenerationService(fake_factory(), rendezvous=tmp_path / "missing" / "job") as service:
        assert service.owner
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match=r"the rendezvous .* cannot be used"):
        GenerationService(fake_factory(), rendezvous=tmp_path / "file" / "job").start()


def test_folders_are_measured_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("\u00e9" * 40)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with GenerationService(fake_factory()) as service:
        assert _value(service.client, "a") == 7
    assert os.listdir(folder) == []


@pytest.mark.parametrize("entry", [Path("here"), "", "a/file.zip", 7, None, "\udcff"], ids=repr)
def test_no_entry_of_sys_path_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: object) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, entry])
    with GenerationService(fake_factory()) as service:
        assert service.alive


def test_stopping_does_not_wait_for_workers_that_live_on(tmp_path: Path) -> None:
    """A forked worker keeps the pipe open that tells the service to stop."""
    service = GenerationService(fake_factory(tmp_path), max_wait=0).start()
    [(process, pipe)] = _workers(service.client, ["once"], ["fork"])
    assert pipe.recv()[1] == 7
    start = time.monotonic()
    service.stop(timeout=20)
    assert time.monotonic() - start < 10
    pipe.send(None)
    process.join()
    pipe.close()


def test_load_failure_is_raised_where_the_service_is_started() -> None:
    with pytest.raises(ModelLoadError, match="no weights in here"):
        GenerationService(refusing_factory("no weights in here")).start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_wait": -1}, "max_wait is -1"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"factory": lambda: None}, "does not pickle"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ServiceError, match=message):
        GenerationService(**{"factory": fake_factory(), **arguments})


def test_lifecycle_mistakes_are_named() -> None:
    service = GenerationService(fake_factory())
    with pytest.raises(ServiceError, match="not running"):
        _ = service.client
    with service, pytest.raises(ServiceError, match="is already running"):
        service.start()
    with service, pytest.raises(ServiceError, match=r"hand `service\.client`"):
        pickle.dumps(service)
    assert not service.alive


def test_a_client_pickles_small() -> None:
    with GenerationService(fake_factory()) as service:
        data = pickle.dumps(service.client)
        assert len(data) < 300
        assert _value(pickle.loads(data), "a") == 7  # noqa: S301


def test_ranks_share_one_service(tmp_path: Path) -> None:
    meeting = tmp_path / "job"
    with GenerationService(fake_factory(), rendezvous=meeting) as first:
        with GenerationService(fake_factory(), rendezvous=meeting) as second:
            assert (first.owner, second.owner) == (True, False)
            assert first.pid == second.pid
            assert second.alive
        assert first.alive  # the other one only detached
    with GenerationService(fake_factory(), rendezvous=meeting) as third:
        assert third.owner


def test_ranks_are_recognised_by_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert job_rendezvous("variants") is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    one = job_rendezvous("variants")
    assert one == job_rendezvous("variants")
    assert one != job_rendezvous("others")
    monkeypatch.setenv("MASTER_PORT", "29501")
    assert one != job_rendezvous("variants")


def test_files_of_old_jobs_are_removed_unless_one_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = job_rendezvous().parent
    for name in ("ended", "ended.address", "running", "running.address", "recent"):
        (folder / name).write_text("")
        if name != "recent":
            os.utime(folder / name, (0, 0))
    lock = try_lock(folder / "running")
    job_rendezvous()
    os.close(lock)
    assert sorted(path.name for path in folder.iterdir()) == ["recent", "running", "running.address"]


@pytest.mark.parametrize("stopped", [False, True])
def test_service_ends_with_a_killed_starter(short_folder: Path, stopped: bool) -> None:
    """Also while it is stopped, which stands for a long native call; its folder goes with the next service's start."""
    script = (
        "import sys, time; sys.path[:] = " + repr([str(Path(__file__).parents[1] / "helpers"), *sys.path]) + "\n"
        "from service_fakes import fake_factory; from sgid_transforms.service import GenerationService\n"
        "service = GenerationService(fake_factory()).start(); print(service.pid, flush=True); time.sleep(100)"
    )
    environment = {**os.environ, "TMPDIR": str(short_folder)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        starter.kill()
    _until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), seconds=10)
    assert len(list(short_folder.glob("sgid-service-*"))) == 1
    check = script.replace("time.sleep(100)", "service.stop()")
    subprocess.run([sys.executable, "-c", check], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert list(short_folder.glob("sgid-service-*")) == []


def test_start_and_stop_leak_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cycles by default; ``SGID_TEST_CYCLES=1000`` is for before a release (docs/dataloader.md has the result)."""
    cycles = int(os.environ.get("SGID_TEST_CYCLES", "8"))
    pids: list[int | None] = []

    def resources() -> tuple[int, set[str], int, list[str], set[str]]:
        gc.collect()
        # Other tests may run beside this one: shared memory of torch's is known by its process, folders are in one of our own.
        shared = {name for name in os.listdir("/dev/shm") if "sgid" in name or any(f"_{pid}_" in name for pid in pids)}
        return len(os.listdir("/proc/self/fd")), _children(), threading.active_count(), os.listdir(folder), shared

    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with GenerationService(fake_factory()) as service:  # the thread that starts services stays for the next ones
            pids.append(service.pid)
        before = resources()
        for _ in range(cycles):
            with GenerationService(fake_factory()) as service:
                assert os.listdir(folder)
                pids.append(service.pid)
                service.client.generate([wish("a")])
        assert resources() == before
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(pids) == cycles + 1


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())


@pytest.mark.parametrize("on_miss", ["generate", "queue"])
def test_a_picture_too_large_for_the_service_is_refused_in_a_sentence_and_fails_alone(tmp_path, monkeypatch, on_miss):
    monkeypatch.setattr("sgid_transforms.service.client.PICTURE_BYTES", 3 * 40 * 40)
    captions = CaptionStore(tmp_path / "c.sqlite")
    pictures = [torch.full((3, side, 40), 9, dtype=torch.uint8) for side in (40, 41)]
    for picture in pictures:
        captions.put(CaptionRecord(image_key(picture), "a caption", label="cat"))
    sgid = SGIDAugment(recipe=Recipe(caption_from="own"), captions=captions, variants=tmp_path / "v", p=1.0, on_miss=on_miss)
    with sgid.serve(device="cpu"):
        with pytest.raises(
            GenerationError, match="a picture of 40 x 41 pixels is too large for the generation service, which takes 1,600"
        ):
            sgid.augment(pictures, ["cat", "cat"])
        _until(lambda: len(list((tmp_path / "v").rglob("*.png"))) == 1)  # the other one is made
        sgid.on_error = "original"
        assert torch.equal(sgid(pictures[1]), pictures[1])
    assert sgid.stats().failed >= 2
