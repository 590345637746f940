"""Kill 4 writers of one VariantStore 200 times while 2 readers look on, then count what was lost. Run by its test.

A script of its own, because it forks: the writers are plain forks of a process with one thread.
"""

import gc
import os
import random
import signal
import sys
import time

import torch

from sgid_transforms.variants import Provenance, VariantStore

KEYS, NUMBERS = 64, 60
PATTERN = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def key_of(index: int) -> str:
    return f"{index * 0x9E3779B97F4A7C15 % 2**64:016x}" * 2


def image_of(index: int, number: int) -> torch.Tensor:
    """A different image for each variant, cheap to make, so that a mix-up is seen."""
    return (PATTERN + (index * 31 + number * 7) % 256).roll(number % 48, 2)


def write(root: str, log: int, seed: int) -> None:
    """Put variants, and report each one that is complete with one atomic write to a pipe-like log."""
    store = VariantStore(root, fsync=seed % 4 == 0)  # a kill cannot tell the difference, but waiting for disks takes time
    rng = random.Random(seed)
    while True:
        # A small range, so that the writers often want the same variant.
        index, number = rng.randrange(KEYS), rng.randrange(NUMBERS)
        store.put("01aa", key_of(index), number, image_of(index, number), Provenance(f"{index}", seed=number))
        os.write(log, f"{index:03d} {number:07d}\n".encode())
        time.sleep(0.0005)  # or the killer waits longer for a processor than it takes to kill


def read(root: str, result: int, stop: int) -> None:
    """Read random variants until told to stop; then report the hits, and the reads that were wrong."""
    store = VariantStore(root)
    rng = random.Random(stop)
    hits = wrong = 0
    while os.path.exists(f"{root}.running"):
        index, number = rng.randrange(KEYS), rng.randrange(NUMBERS)
        image = store.get_image("01aa", key_of(index), number)
        time.sleep(0.002)  # leave the processors to the writers
        if image is not None:
            hits += 1
            wrong += not torch.equal(image, image_of(index, number))
    os.write(result, f"{hits} {wrong + store.quarantined}\n".encode())


def fork(function, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        os.nice(5)  # let the killer have its turn on a busy machine
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return pid


def main(root: str, kills: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # collections in the forks would copy the parent's pages
    rng = random.Random(1)
    open(f"{root}.running", "w").close()
    log = os.open(f"{root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    results = os.open(f"{root}.results", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    readers = [fork(read, root, results, seed) for seed in range(2)]
    writers = [fork(write, root, log, seed) for seed in range(4)]
    for kill in range(kills):
        time.sleep(rng.expovariate(300))  # the random moment
        slot = rng.randrange(4)
        os.kill(writers[slot], signal.SIGKILL)
        os.waitpid(writers[slot], 0)
        writers[slot] = fork(write, root, log, 100 + kill)
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    os.unlink(f"{root}.running")
    for pid in readers:
        os.waitpid(pid, 0)

    store = VariantStore(root)
    with open(f"{root}.log") as file:
        completed = {tuple(map(int, line.split())) for line in file}
    lost = sum(1 for index, number in completed if not _is_right(store, index, number))
    with open(f"{root}.results") as file:
        reports = [tuple(map(int, line.split())) for line in file]
    left_behind = store.stats().temporary
    swept = store.sweep()
    report = store.verify()
    print(
        f"kills={kills} completed={len(completed)} lost={lost} readers={len(reports)} hits={min(hits for hits, _ in reports)} "
        f"wrong={sum(wrong for _, wrong in reports)} damaged={len(report.damaged) + len(report.foreign)} "
        f"quarantined={store.stats().quarantined} swept={swept == left_behind} temporary={store.stats().temporary}"
    )


def _is_right(store: VariantStore, index: int, number: int) -> bool:
    variant = store.get("01aa", key_of(index), number)
    if variant is None or variant.provenance != Provenance(f"{index}", seed=number):
        return False
    return torch.equal(variant.image, image_of(index, number))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
