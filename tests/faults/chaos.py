"""Attack the stores and the service at random, and count what goes wrong: ``make chaos``.

Every attack is seeded. It returns how often it tried, and a sentence for each violation of what ``docs/guarantees.md``
promises. The test beside this file makes a short cut of all of them.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from service_fakes import fake_factory, wish
from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.errors import ServiceError, StoreError
from sgid_transforms.recipe import Recipe
from sgid_transforms.service import GenerationService, ServiceClient
from sgid_transforms.transforms.augment import SGIDAugment
from sgid_transforms.variants import Provenance, VariantStore

FINGERPRINT = "01aa"
DEADLINE = 60.0  # seconds that nothing may wait longer than
TESTS = Path(__file__).parents[1]


class Outcome(NamedTuple):
    """What an attack did."""

    tries: int
    violations: list[str]


def key_of(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}"


def image_of(number: int) -> torch.Tensor:
    return torch.full((3, 8, 8), number % 256, dtype=torch.uint8)


def record_of(number: int) -> CaptionRecord:
    return CaptionRecord(key_of(number), f"picture {number} " * 8, "cat", number / 2**20, captioner="blip", path="a/b.png")


# --- stores


def kills(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """SIGKILL of writers of both stores while others read; every completed write must be there, whole."""
    violations = []
    for script, target in (("captions/kill_caption_writers.py", "c.sqlite"), ("variants/kill_variant_writers.py", "v")):
        done = subprocess.run(
            [sys.executable, TESTS / script, folder / target, str(tries // 2)], capture_output=True, text=True, timeout=600
        )
        result = dict(item.split("=") for item in done.stdout.split())
        counts = ("lost", "torn", "wrong", "damaged", "quarantined")
        wrong = {name: result[name] for name in counts if result.get(name, "0") != "0"}
        if done.returncode or wrong or result.get("integrity", "ok") != "ok":
            violations.append(f"{script}: {wrong or done.stderr[-300:]}")
    return Outcome(tries, violations)


def damaged(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A file after an accident."""
    kind = rng.randrange(6)
    if kind == 0 and data:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 30])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    place = rng.randrange(len(data) + 1)
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:place] + bytes(len(data) - place)
    if kind == 3:
        return data + rng.randbytes(rng.randrange(1, 100))
    if kind == 4:
        return other
    return data[:place] + other[place:]


def corrupt_variants(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """Damaged variant files: each is read as it was stored, or not at all."""
    store = VariantStore(folder / "variants", fsync=False)
    violations: list[str] = []
    numbers = range(20)
    for number in numbers:
        store.put(FINGERPRINT, key_of(number), 0, image_of(number), Provenance(str(number)))
    paths = {ref.key: ref.path for ref in store.iter()}
    whole = {key: path.read_bytes() for key, path in paths.items()}
    for _ in range(tries):
        number, other = rng.choice(numbers), rng.choice(numbers)
        key = key_of(number)
        paths[key].write_bytes(damaged(whole[key], rng, whole[key_of(other)]))
        found = store.get_image(FINGERPRINT, key, 0)
        if found is not None and not torch.equal(found, image_of(number)):
            violations.append(f"variant {number} was read as another image")
        paths[key].unlink(missing_ok=True)
        store.put(FINGERPRINT, key, 0, image_of(number), Provenance(str(number)))
    if not store.verify().ok:
        violations.append("the store is not whole after all was made anew")
    return Outcome(tries, violations)


def corrupt_captions(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """Damaged SQLite and log files: each record is read as it was written, or is missing, or there is a StoreError."""
    source = folder / "whole.sqlite"
    store = CaptionStore(source)
    right = {record.key: record for record in map(record_of, range(300))}
    store.put_many(list(right.values())[:150])
    store.close()
    first = source.read_bytes()
    store.put_many(list(right.values())[150:])
    files = {end: Path(f"{source}{end}").read_bytes() for end in ("", "-wal")}
    violations: list[str] = []
    path, read = folder / "damaged.sqlite", 0
    for number in range(tries):
        for end in ("", "-wal", "-shm", ".damaged"):
            Path(f"{path}{end}").unlink(missing_ok=True)
        end = rng.choice(["", "-wal"])
        for name, data in files.items():
            Path(f"{path}{name}").write_bytes(damaged(data, rng, first) if name == end else data)
        broken = CaptionStore(path)
        try:
            found = broken.get_many(list(right)) | {record.key: record for record in broken}
            read += len(found)
            violations += [f"try {number}: {key} has another text" for key, record in found.items() if record != right[key]]
            broken.put(replace(record_of(0), caption="new"))
            if broken.get(key_of(0)) not in (None, record_of(0), replace(record_of(0), caption="new")):
                violations.append(f"try {number}: a text was read that nobody wrote")
        except StoreError:
            pass
        finally:
            broken.close()
    store.close()
    if not 0 < read < tries * len(right):
        violations.append(f"{read} records were read: the attack proves nothing")
    return Outcome(tries, violations)


def full_disks(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """A limit on the size of files, which strikes like a full disk; what was reported as stored must be there afterwards."""
    violations: list[str] = []
    for number in range(tries):
        root = folder / str(number)
        root.mkdir()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(0, 120_000), resource.RLIM_INFINITY))
            variants, captions = VariantStore(root / "v", fsync=False), CaptionStore(root / "c.sqlite")
            for index in range(120):
                try:
                    captions.put(record_of(index))
                    os.write(writer, f"c{index}\n".encode())
                    variants.put(FINGERPRINT, key_of(index), 0, image_of(index), Provenance("x"))
                    os.write(writer, f"v{index}\n".encode())
                except StoreError:
                    pass
                except BaseException as error:
                    os.write(writer, f"!{type(error).__name__}: {error}\n".encode()[:300])
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            said = pipe.read().split("\n")
        os.waitpid(pid, 0)
        violations += [f"try {number}: {line}" for line in said if line.startswith("!")]
        variants, captions = VariantStore(root / "v"), CaptionStore(root / "c.sqlite")
        kept = {record.key for record in captions}
        for line in said:
            if line.startswith("c") and key_of(int(line[1:])) not in kept:
                violations.append(f"try {number}: caption {line[1:]} was lost")
            if line.startswith("v") and variants.get_image(FINGERPRINT, key_of(int(line[1:])), 0) is None:
                violations.append(f"try {number}: variant {line[1:]} was lost")
        if not variants.verify().ok or not captions.verify().ok:
            violations.append(f"try {number}: something half-written was left")
        captions.close()
        shutil.rmtree(root)
    return Outcome(tries, violations)


def links(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """Symbolic links at every level of a store: not a byte is written, moved or removed outside of it."""
    violations = []
    for number in range(tries):
        root, outside = folder / f"s{number}", folder / f"o{number}"
        store = VariantStore(root, fsync=False)
        for index in range(3):
            store.put(FINGERPRINT, key_of(index), 0, image_of(index), Provenance("x"))
        outside.mkdir()
        (outside / "precious.png").write_bytes(b"precious")
        (outside / f"{key_of(7)}-0.png").write_bytes(b"not ours")
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        inside = [path for path in (root, *root.rglob("*")) if path != root]
        victim = rng.choice([*inside, root / "tmp", root / "quarantine", root / FINGERPRINT / key_of(7)[:2]])
        if victim.is_dir() and not victim.is_symlink():
            shutil.rmtree(victim)
        else:
            victim.unlink(missing_ok=True)
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.symlink_to(rng.choice([outside, outside / "precious.png", outside / "nothing"]))
        acts: list[Callable[[VariantStore, str], object]] = [
            lambda store, key: store.put(FINGERPRINT, key, 0, image_of(1), Provenance("x")),
            lambda store, key: store.get_image(FINGERPRINT, key, 0),
            lambda store, key: store.put_failure(FINGERPRINT, key, 0, ["black"]),
            lambda store, key: store.verify(repair=True),
            lambda store, key: store.sweep(max_age=0),
            lambda store, key: store.prune(keep=[]),
            lambda store, key: list(store.iter()),
        ]
        for act in rng.sample(acts, 5):
            with contextlib.suppress(StoreError):
                act(store, key_of(rng.randrange(9)))
        after = {path.name: path.read_bytes() for path in outside.iterdir()}
        if after != before:
            violations.append(f"try {number}: {victim.relative_to(root)} led to a change outside: {set(after) ^ set(before)}")
    return Outcome(tries, violations)


# --- the service


def deaths(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """SIGKILL of the service under 4 asking threads, and its restart: answers are right or ServiceErrors, in time."""
    violations: list[str] = []
    service = GenerationService(fake_factory(seconds=0.002), timeout=DEADLINE).start()
    addresses, stop = [service.client.address], threading.Event()

    def work(number: int) -> None:
        own = random.Random(number)
        while not stop.is_set():
            client = ServiceClient(addresses[0], timeout=DEADLINE)
            start = time.monotonic()
            try:
                values = [own.randrange(256) for _ in range(own.randrange(1, 6))]
                asked = [wish(f"{own.getrandbits(64):x}", value) for value in values]
                answers = [255 - int(outcome.image[0, 0, 0]) for outcome in client.generate(asked)]
                if answers != values:
                    violations.append(f"asked for {values}, got {answers}")
            except ServiceError:
                time.sleep(0.005)
            if time.monotonic() - start > DEADLINE + 5:
                violations.append(f"a request took {time.monotonic() - start:.0f} s")

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(tries):
        time.sleep(rng.expovariate(1))  # some deaths come before it has imported PyTorch, most while it works
        os.kill(service.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        service.restart()
        addresses[0] = service.client.address
        if number % 50 == 49:
            client = service.client
            if 255 - int(client.generate([wish(f"check{number}", 9)])[0].image[0, 0, 0]) != 9:
                violations.append("a restarted service answered wrongly")
    stop.set()
    for thread in threads:
        thread.join(DEADLINE + 10)
        if thread.is_alive():
            violations.append("a thread hangs")
    pid, place = service.pid, Path(service.client.address).parent
    service.stop()
    if os.path.exists(f"/proc/{pid}") or place.exists():
        violations.append("a process or its folder was left behind")
    return Outcome(tries, violations)


def stops(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """SIGSTOP of the service: who waits learns of it at the deadline, and the service can be stopped in time."""
    violations: list[str] = []
    for number in range(tries):
        with GenerationService(fake_factory()) as service:
            service.client.generate([wish("warm")])
            client = ServiceClient(service.client.address, timeout=0.3)
            os.kill(service.pid, signal.SIGSTOP)
            start = time.monotonic()
            try:
                client.generate([wish("a", size=rng.choice([4, 1500]))])
                violations.append(f"try {number}: a stopped service answered")
            except ServiceError:
                pass
            if time.monotonic() - start > 5:
                violations.append(f"try {number}: the deadline of 0.3 s came after {time.monotonic() - start:.1f} s")
            start = time.monotonic()
            service.stop(timeout=0.2)
            if time.monotonic() - start > 10:
                violations.append(f"try {number}: stop() took {time.monotonic() - start:.1f} s")
    return Outcome(tries, violations)


def orphans(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """SIGKILL of the process that started a service, some of them stopped meanwhile: nothing lives on, no folder stays."""
    code = """
import sys, threading, time
from service_fakes import fake_factory
from sgid_transforms.service import GenerationService
def run():
    service = GenerationService(fake_factory()).start()
    print(service.pid, service.client.address, flush=True)
    time.sleep(60)
threading.Thread(target=run).start() if len(sys.argv) > 1 else run()
time.sleep(60)
"""
    violations = []
    places = []
    for number in range(tries):
        arguments = ["thread"] if rng.random() < 0.5 else []
        starter = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        pid, address = starter.stdout.readline().split()
        if rng.random() < 0.5:
            os.kill(int(pid), signal.SIGSTOP)
        starter.kill()
        starter.wait()
        starter.stdout.close()
        places.append(Path(address).parent)
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{pid}") and _state(pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        if os.path.exists(f"/proc/{pid}") and _state(pid) != "Z":
            violations.append(f"try {number}: the service lives on ({arguments}, {_state(pid)})")
            os.kill(int(pid), signal.SIGKILL)
    with GenerationService(fake_factory()):
        pass
    violations += [f"{place} was left behind" for place in places if place.exists()]
    return Outcome(tries, violations)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def hostile_frames(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """Random and malformed frames: an honest client beside them is answered rightly and soon, and memory stays bounded."""
    violations: list[str] = []
    with GenerationService(fake_factory()) as service:
        client = ServiceClient(service.client.address, timeout=20)
        client.generate([wish("warm")])
        idle = _memory(service.pid)
        keep: list[socket.socket] = []
        for number in range(tries):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.settimeout(5)
            try:
                peer.connect(service.client.address)
                peer.sendall(_hostile(rng))
                if rng.random() < 0.5:
                    peer.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            keep.append(peer)
            while len(keep) > 40:
                keep.pop(rng.randrange(len(keep))).close()
            if number % 5 == 0:
                start, value = time.monotonic(), rng.randrange(256)
                try:
                    if 255 - int(client.generate([wish(f"honest{number}", value)])[0].image[0, 0, 0]) != value:
                        violations.append(f"try {number}: an honest client got a wrong answer")
                except ServiceError as error:
                    violations.append(f"try {number}: an honest client got {error}")
                if time.monotonic() - start > 10:
                    violations.append(f"try {number}: an honest client waited {time.monotonic() - start:.1f} s")
        if _memory(service.pid) > 1.5 * idle:
            violations.append(f"memory grew from {idle} to {_memory(service.pid)} MB")
        for peer in keep:
            peer.close()
    return Outcome(tries, violations)


def floods(folder: Path, rng: random.Random, tries: int) -> Outcome:
    """Many clients of a real model announce up to 192 MiB and send all, much or little of it: its memory stays bounded."""
    violations: list[str] = []
    sgid = SGIDAugment(recipe=Recipe(caption_from="own"), captions=folder / "c.sqlite", variants=folder / "v")
    with sgid.serve(device="cpu", timeout=DEADLINE) as service, ThreadPoolExecutor(24) as pool:
        honest = ServiceClient(service.client.address, timeout=DEADLINE)
        honest.generate([wish("00" * 16, size=32)])
        idle = _memory(service.pid)

        def flood(seed: int) -> None:
            own = random.Random(seed)
            rows, columns = own.choice([(2364, 2364), (1000, 1000), (5016, 5016), (8192, 8192)])
            size = 3 * rows * columns
            item = {"key": f"{seed:032x}", "variant": 0, "label": "cat", "size": [rows, columns]}
            text = json.dumps({"op": own.choice(["generate", "enqueue"]), "items": [item]}).encode()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(20)
                peer.connect(service.client.address)
                peer.sendall(struct.pack(">4sIQ", b"SGI3", len(text), size) + text)
                peer.sendall(bytes(own.choice([size, size - 1, size // 2, 1000])))
                if own.random() < 0.7:  # the others leave at once
                    time.sleep(own.random() * 3)

        floods = [pool.submit(flood, rng.getrandbits(60)) for _ in range(tries)]
        highest, number = 0, 0
        while not all(one.done() for one in floods):
            start = time.monotonic()
            try:
                honest.generate([wish(f"{number:032x}", size=32)])
            except ServiceError as error:
                violations.append(f"an honest client got {error}")
            if time.monotonic() - start > 15:
                violations.append(f"an honest client waited {time.monotonic() - start:.1f} s")
            highest, number = max(highest, _memory(service.pid)), number + 1
            time.sleep(0.02)
        if highest > 1.5 * idle:
            violations.append(f"memory grew from {idle} to {highest} MB")
        if number < 3:
            violations.append("the floods ended before they were looked at: the attack proves nothing")
    return Outcome(tries, violations)


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def _hostile(rng: random.Random) -> bytes:
    item = {"key": "ab" * 16, "variant": 0, "label": "cat", "size": [4, 4]}
    odd = [None, -1, 2**70, 1.5, "x", [], {}, True, "\ud800", "a" * 5000, [[]], float("nan")]
    header: dict[str, object] = {"op": rng.choice(["generate", "enqueue", "hello", "stats", "stop", "", "?"]), "items": [item]}
    payload = bytes(48)
    kind = rng.randrange(8)
    if kind == 0:
        item[rng.choice(list(item))] = rng.choice(odd)
    elif kind == 1:
        header[rng.choice(["op", "items", "recipe", "number"])] = rng.choice(odd)
    elif kind == 2:
        payload = rng.randbytes(rng.randrange(200))
    elif kind == 3:
        header["x"] = json.loads("[" * 900 + "]" * 900)
    text = json.dumps(header).encode()
    if kind == 4:
        text = rng.choice([b"[" * 100_000, b"9" * 100_000, b"\xff" * 100, text[:-3], json.dumps(header).encode("utf-16")])
    sizes = [len(text), len(payload)]
    if kind == 5:
        sizes[rng.randrange(2)] = rng.choice([0, 1, 2**20 + 1, 2**31, 2**32 - 1])
    frame = struct.pack(">4sIQ", b"SGI3", *sizes) + text + payload
    if kind == 6:
        frame = rng.randbytes(rng.randrange(1, 300))
    return frame[: rng.randrange(1, len(frame))] if kind == 7 else frame


# --- forks


def forks(folder: Path, rng: random.Random, seconds: int) -> Outcome:
    """Forks while threads count, change settings, and write into both stores: every child can do the same, and ends."""
    sgid = SGIDAugment(recipe=Recipe(caption_from="own"), captions=folder / "c.sqlite", variants=folder / "v", p=0.5)
    stop, violations, tries = threading.Event(), [], 0

    def count() -> None:
        while not stop.is_set():
            sgid.stats()
            sgid.p = random.random()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            sgid.captions.put_many([record_of(number), record_of(number + 1)])
            sgid.variants.put(FINGERPRINT, key_of(number), 0, image_of(number), Provenance("x"))

    threads = [threading.Thread(target=work, daemon=True) for work in (count, write, write)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tries += 1
        pid = os.fork()
        if pid == 0:
            try:
                number = 10**6 + tries
                sgid.captions.put(record_of(number))
                sgid.variants.put(FINGERPRINT, key_of(number), 0, image_of(number), Provenance("x"))
                fine = sgid.captions.get(key_of(number)) == record_of(number) and sgid.stats().seen == 0 and 0 <= sgid.p <= 1
                os._exit(0 if fine else 3)
            except BaseException:
                os._exit(4)
        deadline = time.monotonic() + DEADLINE
        while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.002)
        if not done[0]:
            violations.append(f"child {tries} hangs")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif done[1]:
            violations.append(f"child {tries} ended with {os.waitstatus_to_exitcode(done[1])}")
        elif sgid.captions.get(key_of(10**6 + tries)) is None:
            violations.append(f"what child {tries} wrote was lost")
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
        if thread.is_alive():
            violations.append("a thread hangs")
    if not sgid.captions.verify().ok or not sgid.variants.verify().ok:
        violations.append("a store is damaged")
    return Outcome(tries, violations)


class Attack(NamedTuple):
    run: Callable[[Path, random.Random, int], Outcome]
    amount: int  # tries, or seconds
    short: int
    seconds: int  # that it takes: the longest goes first


ATTACKS = {
    "SIGKILL of writers of both stores": Attack(kills, 1000, 20, 30),
    "damaged variant files": Attack(corrupt_variants, 1500, 60, 5),
    "damaged caption files": Attack(corrupt_captions, 1500, 40, 30),
    "full disks": Attack(full_disks, 120, 5, 15),
    "symbolic links in a store": Attack(links, 300, 20, 5),
    "SIGKILL or SIGTERM of the service, restart": Attack(deaths, 300, 3, 400),
    "SIGSTOP of the service": Attack(stops, 20, 1, 60),
    "SIGKILL of the starter": Attack(orphans, 20, 2, 60),
    "hostile frames": Attack(hostile_frames, 600, 50, 40),
    "floods of pixels": Attack(floods, 200, 12, 60),
    "forks under load": Attack(forks, 300, 3, 310),
}


def run(name: str, seed: int, amount: int) -> Outcome:
    """One attack in folders of its own; folders that it leaves in the temporary one are violations."""
    attack = ATTACKS[name]
    home = Path(tempfile.mkdtemp(prefix="c"))  # short: sockets lie in it
    old, tempfile.tempdir, os.environ["TMPDIR"] = tempfile.tempdir, str(home / "t"), str(home / "t")
    (home / "t").mkdir()
    (home / "d").mkdir()
    try:
        outcome = attack.run(home / "d", random.Random(f"{name} {seed}"), amount)
        left = [path.name for path in (home / "t").glob("sgid-*-*")]
        own = [name for name in left if name.startswith(f"sgid-state-{os.getpid()}-")]  # they go when the process ends
        return Outcome(outcome.tries, [*outcome.violations, *(f"{name} was left behind" for name in left if name not in own)])
    finally:
        tempfile.tempdir = old
        os.environ.pop("TMPDIR")
        shutil.rmtree(home, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(ATTACKS), help="one attack")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of tries")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.only is None:
        return _run_all(arguments.seed, arguments.scale)
    start = time.monotonic()
    outcome = run(arguments.only, arguments.seed, max(1, round(ATTACKS[arguments.only].amount * arguments.scale)))
    seconds = time.monotonic() - start
    print(f"| {arguments.only} | {outcome.tries:,} | {len(outcome.violations)} | {seconds:.0f} s |")
    print("\n".join(outcome.violations[:20]))
    return 1 if outcome.violations else 0


def _run_all(seed: int, scale: float) -> int:
    """Every attack in a process of its own, two at a time."""

    def alone(name: str) -> int:
        command = [sys.executable, __file__, "--only", name, "--seed", str(seed), "--scale", str(scale)]
        done = subprocess.run(command, capture_output=True, text=True)
        print((done.stdout + done.stderr).strip(), flush=True)
        return done.returncode

    print("| attack | tries | violations | time |\n| --- | ---: | ---: | ---: |", flush=True)
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(alone, sorted(ATTACKS, key=lambda name: -ATTACKS[name].seconds)))


if __name__ == "__main__":
    sys.exit(main())
