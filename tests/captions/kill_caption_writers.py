"""Kill 4 writers of one CaptionStore 200 times while 2 readers look on, then count what was lost. Run by its test.

A script of its own, because it forks: the writers are plain forks of a process with one thread.
"""

import os
import random
import signal
import sqlite3
import sys
import time

from sgid_transforms.captions import CaptionRecord, CaptionStore

BATCH = 8


def record_of(batch: int, index: int) -> CaptionRecord:
    return CaptionRecord(
        f"{batch:08x}{index:08x}", f"caption {batch} {index} " * 5, "label", batch / 2**32, path=f"{index}.png"
    )


def write(path: str, log: int, seed: int) -> None:
    """Put batches, and report each one that is complete with one atomic write."""
    store = CaptionStore(path)
    rng = random.Random(seed)
    while True:
        batch = rng.randrange(2**32)
        store.put_many(record_of(batch, index) for index in range(BATCH))
        os.write(log, f"{batch:010d}\n".encode())


def read(path: str, result: int, seed: int) -> None:
    """Read the latest complete batch until told to stop; then report the hits, and the reads that were wrong."""
    store = CaptionStore(path)
    hits = wrong = 0
    while os.path.exists(f"{path}.running"):
        with open(f"{path}.log", "rb") as log:
            log.seek(max(0, os.path.getsize(f"{path}.log") - 11 * (seed + 1)))
            line = log.readline()
        if len(line) == 11:
            batch, index = int(line), hits % BATCH
            hits += 1
            wrong += store.get(record_of(batch, index).key) != record_of(batch, index)
    os.write(result, f"{hits} {wrong}\n".encode())


def fork(function, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        os.nice(5)  # let the killer have its turn on a busy machine
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return pid


def main(path: str, kills: int) -> None:
    rng = random.Random(1)
    open(f"{path}.running", "w").close()
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    results = os.open(f"{path}.results", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    store = CaptionStore(path)
    store.put(record_of(0, 0))  # the forks below inherit an open connection, and must not use it
    readers = [fork(read, path, results, seed) for seed in range(2)]
    writers = [fork(write, path, log, seed) for seed in range(4)]
    for kill in range(kills):
        time.sleep(rng.expovariate(200))  # the random moment
        slot = rng.randrange(4)
        os.kill(writers[slot], signal.SIGKILL)
        os.waitpid(writers[slot], 0)
        writers[slot] = fork(write, path, log, 100 + kill)
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.unlink(f"{path}.running")
    for pid in readers:
        os.waitpid(pid, 0)

    with open(f"{path}.log") as file:
        completed = {int(line) for line in file}
    found: dict[int, int] = {}
    wrong = 0
    for record in store:
        batch, index = int(record.key[:8], 16), int(record.key[8:], 16)
        wrong += record != record_of(batch, index)
        found[batch] = found.get(batch, 0) + 1
    del found[0]
    with open(f"{path}.results") as file:
        reports = [tuple(map(int, line.split())) for line in file]
    with sqlite3.connect(path) as raw:
        integrity = raw.execute("PRAGMA integrity_check").fetchone()[0]
    raw.close()
    print(
        f"kills={kills} completed={len(completed)} lost={len(completed - found.keys())} "
        f"torn={sum(count != BATCH for count in found.values())} "
        f"readers={len(reports)} hits={min(hits for hits, _ in reports)} "
        f"wrong={wrong + sum(bad for _, bad in reports)} integrity={integrity}"
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
