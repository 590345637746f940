"""CaptionStore: forks, spawned processes, threads, killed writers, full disks and read-only media."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from sgid_transforms.captions import CaptionRecord, CaptionStore, database
from sgid_transforms.errors import StoreError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def _python(code, *arguments, prefix=()):
    done = subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_writers_lose_nothing(tmp_path):
    """200 SIGKILLs, 4 writers, 2 readers: no wrong read, no completed batch lost, no batch half stored."""
    script = Path(__file__).with_name("kill_caption_writers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "captions.sqlite"), "200"],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    result = dict(item.split("=") for item in done.stdout.split())
    assert int(result.pop("completed")) > 50
    assert int(result.pop("hits")) > 50
    assert result == {"kills": "200", "lost": "0", "torn": "0", "readers": "2", "wrong": "0", "integrity": "ok"}


def test_a_fork_opens_its_own_connection_and_leaves_the_parents_alone(tmp_path):
    """Run apart, because a fork of a process with threads, as pytest's may be, is warned about."""
    out = _python(
        """
        import gc, os, sys
        from sgid_transforms.captions import CaptionRecord, CaptionStore
        store = CaptionStore(sys.argv[1])
        store.put(CaptionRecord("aa", "parent"))
        pids = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                assert store.get("aa").caption == "parent"
                store.put(CaptionRecord(f"child{number}", "child"))
                if number % 2:
                    store.close()
                del store
                gc.collect()
                os._exit(0)
            pids.append(pid)
            store.put(CaptionRecord(f"parent{number}", "parent"))
        assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)
        print(len(store), CaptionStore(sys.argv[1]).get("child3").caption)
        """,
        tmp_path / "captions.sqlite",
    )
    assert out.split() == ["9", "child"]


def test_a_fork_waits_for_a_write_and_neither_side_hangs_or_loses_anything(tmp_path):
    """A child once found its own file locked for 30 s, or lost what it wrote after its parent had closed."""
    out = _python(
        """
        import os, sys, threading, time
        from sgid_transforms.captions import CaptionRecord, CaptionStore
        store = CaptionStore(sys.argv[1])
        store.put(CaptionRecord("aa", "parent"))
        done = []
        def write():
            while not done:
                store.put_many([CaptionRecord(f"t{number}", str(time.time())) for number in range(50)])
                store.set_ranks()
        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        slowest = 0
        for number in range(20):
            to_child, to_parent = os.pipe(), os.pipe()
            start = time.monotonic()
            pid = os.fork()
            if pid == 0:
                store.put(CaptionRecord(f"first{number}", "child"))
                os.write(to_parent[1], b"x")
                os.read(to_child[0], 1)
                store.put(CaptionRecord(f"second{number}", "child"))
                os._exit(0)
            os.read(to_parent[0], 1)
            slowest = max(slowest, time.monotonic() - start)
            store.close()
            os.write(to_child[1], b"x")
            assert os.waitpid(pid, 0)[1] == 0
            for descriptor in (*to_child, *to_parent):
                os.close(descriptor)
        done.append(True)
        for thread in threads:
            thread.join()
        assert slowest < 25, slowest
        keys = {record.key for record in CaptionStore(sys.argv[1])}
        print(sum(f"{name}{number}" in keys for name in ("first", "second") for number in range(20)))
        """,
        tmp_path / "captions.sqlite",
    )
    assert out.split() == ["40"]


def test_a_fork_inside_a_transaction_leaves_both_sides_whole(tmp_path):
    out = _python(
        """
        import os, sys
        from sgid_transforms.captions import CaptionRecord, CaptionStore
        store = CaptionStore(sys.argv[1])
        def records():
            yield CaptionRecord("aa", "parent")
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            yield CaptionRecord("bb", "parent")
        other = CaptionStore(sys.argv[1] + "2")
        other.put_many(records())
        with other._database.writing(None) as connection:
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            connection.execute("UPDATE captions SET caption = 'x'")
        print([record.caption for record in other])
        """,
        tmp_path / "captions.sqlite",
    )
    assert out.strip() == "['x', 'x']"


def _spawned(store, number, queue):
    store.put(CaptionRecord(f"child{number}", "child"))
    queue.put(store.get("aa").caption)


def test_a_spawned_process_gets_the_store_by_its_path(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    store.put(CaptionRecord("aa", "parent"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(store, 0, queue))
    process.start()
    assert queue.get(timeout=60) == "parent"
    process.join(60)
    assert process.exitcode == 0
    assert store.get("child0").caption == "child"
    process.close()
    queue.close()
    queue.join_thread()
    store.close()


def test_threads_have_connections_of_their_own_that_end_with_them(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    store.put(CaptionRecord("aa", "main"))
    failures = []

    def work(number):
        try:
            for i in range(20):
                store.put(CaptionRecord(f"{number}-{i}", "thread"))
                assert store.get("aa").caption == "main"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store) == 81
    assert len(store._database._handles) == 1
    store.close()


def test_close_closes_the_connections_of_all_threads(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    opened, go_on = threading.Event(), threading.Event()
    seen = []

    def work():
        store.put(CaptionRecord("aa", "x"))
        opened.set()
        go_on.wait(30)
        seen.append(store.get("aa"))

    thread = threading.Thread(target=work)
    thread.start()
    assert opened.wait(30)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["captions.sqlite"]  # no write-ahead log is left
    go_on.set()
    thread.join()
    assert seen == [CaptionRecord("aa", "x")]
    store.close()


def test_a_reader_sees_no_half_transaction_and_does_not_wait_for_the_writer(tmp_path):
    writer, reader = (CaptionStore(tmp_path / "captions.sqlite") for _ in range(2))
    writer.put(CaptionRecord("aa", "old"))

    def records():
        yield CaptionRecord("aa", "new")
        assert reader.get("aa").caption == "old"
        yield CaptionRecord("bb", "new")

    writer.put_many(records())
    with writer._database.writing(None) as connection:
        connection.execute("UPDATE captions SET caption = 'newest'")
        assert {r.caption for r in reader} == {"new"}
    assert {r.caption for r in reader} == {"newest"}
    writer.close()
    reader.close()


def test_a_writer_that_waits_in_vain_gives_up_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    first, second = (CaptionStore(tmp_path / "captions.sqlite") for _ in range(2))
    first.put(CaptionRecord("aa", "x"))
    assert second.get("aa") is not None
    with first._database.writing(None), pytest.raises(StoreError, match="another process has been writing"):
        second.put(CaptionRecord("bb", "x"))
    second.put(CaptionRecord("bb", "x"))
    first.close()
    second.close()


def test_network_file_systems_get_no_write_ahead_log(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_is_on_network", lambda path: True)
    store = CaptionStore(tmp_path / "captions.sqlite")
    store.put(CaptionRecord("aa", "x"))
    with store._database.reading() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert [path.name for path in tmp_path.iterdir()] == ["captions.sqlite"]
    store.close()


@pytest.mark.parametrize(("kind", "network"), [("nfs4", True), ("ext4", False)])
def test_the_longest_mount_point_decides(tmp_path, monkeypatch, kind, network):
    point = str(tmp_path).replace(" ", "\\040")
    mounts = f"none / overlay rw 0 0\nserver:/x {point} {kind} rw 0 0\nnone {point}x nfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, errors: mounts)
    assert database._is_on_network(tmp_path / "captions.sqlite") is network


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path):
    """RLIMIT_FSIZE stops the database from growing, as a full disk does; reads and the old records go on."""
    out = _python(
        """
        import resource, signal, sys
        from sgid_transforms.captions import CaptionRecord, CaptionStore
        from sgid_transforms.errors import StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = CaptionStore(sys.argv[1])
        store.put_many(CaptionRecord(f"{i:04d}", "x" * 100) for i in range(100))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
        try:
            for batch in range(1, 100):
                store.put_many(CaptionRecord(f"{batch}-{i:04d}", "y" * 100) for i in range(100))
        except StoreError as error:
            print(error)
        assert store.get("0042").caption == "x" * 100
        assert len(store) == 100 * batch, (len(store), batch)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        store.put(CaptionRecord("more", "z"))
        assert len(store) == 100 * batch + 1
        """,
        tmp_path / "captions.sqlite",
    )
    assert "could not write the caption store" in out


READ_ONLY = """
import os, subprocess, sys
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.errors import StoreError
mount, clean = sys.argv[1], sys.argv[2] == "clean"
store = CaptionStore(f"{mount}/captions.sqlite")
store.put(CaptionRecord("aa", "x"))
if clean:
    store.close()
else:  # as after a crash: the records are still in the log
    os.mkdir(f"{mount}/copy")
    subprocess.run(f"cp {mount}/captions.sqlite {mount}/captions.sqlite-wal {mount}/copy", shell=True, check=True)
    store.close()
    store = CaptionStore(f"{mount}/copy/captions.sqlite")
subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
for readonly in (True, False):
    reader = CaptionStore(store.path, readonly=readonly)
    try:
        print(reader.get("aa").caption, len(list(reader)))
        assert reader.verify().ok
        reader.put(CaptionRecord("cc", "z"))
    except StoreError as error:
        print(error)
"""


@pytest.mark.parametrize("state", ["clean", "crashed"])
def test_read_only_media(tmp_path, state):
    mount = tmp_path / "mount"
    mount.mkdir()
    prefix = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {mount} && exec "$@"', "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the test with a file that is opened as immutable covers the reading")
    out = _python(READ_ONLY, mount, state, prefix=prefix)
    if state == "clean":
        assert out.count("x 1\n") == 2
        assert "opened with readonly=True" in out
        assert "is write-protected or on read-only media" in out
    else:
        assert out.count("has changes in its -wal file that cannot be read here") == 2


def test_where_no_shared_memory_can_be_made_the_file_is_read_as_immutable(tmp_path, monkeypatch):
    store = CaptionStore(tmp_path / "captions.sqlite")
    store.put(CaptionRecord("aa", "x"))
    store.close()
    (tmp_path / "captions.sqlite-shm").mkdir()  # in the way of the log's shared memory, for root as well
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real_access(path, mode))
    for readonly in (True, False):
        reader = CaptionStore(store.path, readonly=readonly)
        assert reader.get("aa") == CaptionRecord("aa", "x")
        with pytest.raises(StoreError, match=r"readonly=True|read-only media"):
            reader.put(CaptionRecord("bb", "y"))
        reader.close()
