"""Packed variants: the same answers as from loose files, whatever happens while they are packed, copied or damaged."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import Provenance, VariantStore, Verdict, packs
from sgid_transforms.variants.layout import variant_key

RECIPE, OTHER = "01aa", "02bb"


def key_of(number: int, text: str = "a caption") -> str:
    return variant_key(f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}", text)


def image_of(number: int) -> torch.Tensor:
    return torch.full((3, 8, 8), number % 256, dtype=torch.uint8)


def fill(store: VariantStore, count: int, start: int = 0, recipe: str = RECIPE) -> None:
    for number in range(start, start + count):
        assert store.put(recipe, key_of(number), number % 3, image_of(number), Provenance(f"prompt {number}", label="cat"))


@pytest.fixture
def store(tmp_path: Path) -> VariantStore:
    store = VariantStore(tmp_path / "variants", fsync=False)
    fill(store, 20)
    store.put_failure(RECIPE, key_of(99), 1, ["label", "black"])
    return store


def answers(store: VariantStore, count: int = 20) -> dict[str, Any]:
    return {
        "images": [
            None if (one := store.get_image(RECIPE, key_of(n), n % 3)) is None else int(one[0, 0, 0]) for n in range(count)
        ],
        "pil": [
            None if (one := store.get_pil(RECIPE, key_of(n), n % 3)) is None else one.getpixel((0, 0)) for n in range(count)
        ],
        "prompts": [
            None if (one := store.get(RECIPE, key_of(n), n % 3)) is None else one.provenance.prompt for n in range(count)
        ],
        "there": [store.contains(RECIPE, key_of(n), n % 3) for n in range(count)],
        "others": [store.contains(RECIPE, key_of(n), n % 3 + 1) for n in range(count)],
        "found": [[(ref.key, ref.variant) for ref in store.find(RECIPE, key_of(n)[:-16])] for n in range(count)],
        "failures": (store.failure(RECIPE, key_of(99), 1), store.failure(RECIPE, key_of(99), 0)),
        "iter": sorted((ref.key, ref.variant, store.data(ref)) for ref in store.iter(RECIPE)),
        "failed": sorted((ref.key, ref.variant) for ref in store.iter_failures()),
        "count": store.count(),
        "stats": (store.stats().variants, store.stats().failures, store.stats().bytes),
    }


def test_a_packed_store_answers_as_before(store: VariantStore) -> None:
    fill(store, 1, 5000, OTHER)
    before = answers(store)
    watching = VariantStore(store.root, readonly=True)
    assert answers(watching) == before
    assert store.pack() == 22
    assert answers(store) == answers(watching) == answers(copy.deepcopy(store)) == before
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert len(files) == 2 * 2 + 2  # a tar file and an index for each recipe, the store's marker and the lock
    assert store.verify().ok
    assert store.verify().checked == 22


def test_new_variants_are_loose_until_they_are_packed_too(store: VariantStore) -> None:
    store.pack()
    fill(store, 10, 20)
    before = answers(store, 30)
    assert before["count"] == 30
    assert store.pack() == 10
    assert store.pack() == 0
    assert answers(store, 30) == before
    assert len(list(store.root.glob("packs/*/*.idx"))) == 2
    assert not store.put(RECIPE, key_of(3), 0, image_of(7), Provenance("again"))  # the first writer won


def test_a_tar_file_ends_where_it_is_large_enough(store: VariantStore) -> None:
    before = answers(store)
    store.pack(shard_bytes=6000)
    assert len(list(store.root.glob("packs/*/*.tar"))) > 3
    assert answers(store) == before


def test_webdataset_reads_a_pack(store: VariantStore) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    store.pack()
    (tar,) = store.root.glob("packs/*/*.tar")
    with tar.open("rb") as file:
        members = tariterators.tar_file_expander([{"url": str(tar), "stream": file}])
        samples = list(tariterators.group_by_keys(members))
    seen = {}
    for sample in samples:
        if "png" in sample:
            picture = Image.open(io.BytesIO(sample["png"]))
            seen[json.loads(sample["json"])["prompt"]] = picture.getpixel((0, 0))[0]
    assert seen == {f"prompt {n}": n for n in range(20)}
    assert [sample["failed.json"] for sample in samples if "failed.json" in sample] == [b'{"reasons": ["label", "black"]}']


def test_a_pack_is_an_ordinary_tar_file(store: VariantStore) -> None:
    store.pack()
    (tar,) = store.root.glob("packs/*/*.tar")
    with tarfile.open(tar) as file:
        names = file.getnames()
    assert len(names) == 41
    assert f"{key_of(3)}-0.png" in names
    assert f"{key_of(3)}-0.json" in names
    assert f"{key_of(99)}-1.failed.json" in names


def test_verdicts_hold_for_packed_variants(store: VariantStore) -> None:
    store.judge([Verdict(RECIPE, key_of(4), 1, "reject", who="anna")])
    store.pack()
    found = store.get(RECIPE, key_of(4), 1)
    assert found is not None
    assert found.verdict is not None
    assert found.verdict.decision == "reject"
    assert store.rejections(RECIPE) == {key_of(4)[:-16]: frozenset({(key_of(4), 1)})}


def test_a_damaged_entry_is_a_miss_and_can_be_made_again(store: VariantStore, caplog: pytest.LogCaptureFixture) -> None:
    store.pack()
    (tar,) = store.root.glob("packs/*/*.tar")
    (ref,) = store.find(RECIPE, key_of(7)[:-16])
    data = bytearray(tar.read_bytes())
    data[data.index(store.data(ref)) + 60] ^= 1
    tar.write_bytes(data)
    careful = VariantStore(store.root, readonly=True)
    assert careful.get_image(RECIPE, key_of(7), 1) is None
    assert careful.contains(RECIPE, key_of(7), 1)  # it must not write, so others have to learn it themselves
    assert careful.quarantined == 1
    assert [path.name for path in careful.verify().damaged] == [f"{key_of(7)}-1.png"]
    assert store.get_image(RECIPE, key_of(7), 1) is None
    assert not careful.contains(RECIPE, key_of(7), 1)
    assert caplog.text.count("its digest does not match") == 2  # once by each object
    assert store.put(RECIPE, key_of(7), 1, image_of(77), Provenance("again"))
    assert answers(store)["images"] == [*range(7), 77, *range(8, 20)]
    assert store.pack() == 1
    assert answers(store)["images"] == [*range(7), 77, *range(8, 20)]


def test_repair_forgets_damaged_entries(store: VariantStore) -> None:
    store.pack()
    (tar,) = store.root.glob("packs/*/*.tar")
    os.truncate(tar, tar.stat().st_size // 2)
    report = store.verify()
    assert len(report.damaged) >= 5
    assert not report.repaired
    assert store.verify(repair=True).repaired == len(report.damaged)
    assert store.verify().ok
    assert store.count() + len(list(store.iter_failures())) + len(report.damaged) == 21


def test_a_tar_file_that_is_away_is_an_error_and_not_forgotten(store: VariantStore) -> None:
    store.pack()
    before = answers(VariantStore(store.root))
    (tar,) = store.root.glob("packs/*/*.tar")
    tar.rename(tar.with_suffix(".away"))
    fresh = VariantStore(store.root)
    assert fresh.get_image(RECIPE, key_of(1), 1) is None
    assert [path.suffix for path in fresh.verify().damaged].count(".idx") == 1
    tar.with_suffix(".away").rename(tar)
    assert answers(VariantStore(store.root)) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], r"is cut short \(\d+ bytes\); copy it again"),
        (lambda data: data[:10], "is not the index of a pack; remove it, or copy the pack again"),
        (lambda data: b"x" * len(data), "is not the index of a pack"),
        (lambda data: data[:8] + (2).to_bytes(4, "little") + data[12:], "has format 2, this version knows up to 1; upgrade"),
    ],
)
def test_a_broken_index_is_refused_in_a_sentence(store: VariantStore, damage: Any, message: str) -> None:
    store.pack()
    (index,) = store.root.glob("packs/*/*.idx")
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(StoreError, match=message):
        VariantStore(store.root).get_image(RECIPE, key_of(1), 1)


def test_a_changed_index_is_found_by_verify(store: VariantStore) -> None:
    store.pack()
    (index,) = store.root.glob("packs/*/*.idx")
    data = bytearray(index.read_bytes())
    data[-30] ^= 1
    index.write_bytes(data)
    assert index in VariantStore(store.root).verify().damaged


def test_removed_variants_and_pruned_recipes_are_gone(store: VariantStore) -> None:
    fill(store, 3, 5000, OTHER)
    store.pack()
    gone = [ref for ref in store.iter(RECIPE) if ref.key in (key_of(1), key_of(2))]
    assert store.remove(gone) == 2
    assert store.count(RECIPE) == 18
    assert not store.contains(RECIPE, key_of(1), 1)
    assert VariantStore(store.root).get_image(RECIPE, key_of(2), 2) is None
    assert store.prune(RECIPE) == 3
    assert store.count(OTHER) == 0
    assert not (store.root / "packs" / OTHER).exists()
    assert store.count() == 18


def test_packs_merge_by_merge_and_by_copying(store: VariantStore, tmp_path: Path) -> None:
    other = VariantStore(tmp_path / "other", fsync=False)
    fill(other, 10, 15)
    other.pack()
    store.pack()
    into = VariantStore(tmp_path / "into", fsync=False)
    assert into.merge(store) == 21
    assert into.merge(other) == 5
    assert into.count() == 25
    for path in (other.root / "packs" / RECIPE).iterdir():
        (store.root / "packs" / RECIPE / path.name).write_bytes(path.read_bytes())
    assert answers(store, 25)["images"] == list(range(25))
    assert (store.count(), store.stats().variants) == (25, {RECIPE: 25})  # each once, though five are in both
    assert store.verify().ok


def test_only_one_process_packs_at_a_time(store: VariantStore) -> None:
    (store.root / "packs").mkdir()
    lock = packs_lock(store)
    try:
        with pytest.raises(StoreError, match=r"another process packs .*; wait until it is done"):
            store.pack()
    finally:
        os.close(lock)
    assert store.pack() == 21


def packs_lock(store: VariantStore) -> int:
    from sgid_transforms.files import try_lock

    lock = try_lock(store.root / "packs" / "lock")
    assert lock is not None
    return lock


@pytest.mark.parametrize("seed", range(1))
def test_killed_packers_lose_nothing(tmp_path: Path, seed: int) -> None:
    """Readers beside it find every variant all the while."""
    store = VariantStore(tmp_path / "variants", fsync=False)
    fill(store, 150)
    before = answers(store, 150)["images"]
    code = (
        "import os, random, signal, sys; from sgid_transforms.variants import packs, store as s;"
        "left = random.Random(int(sys.argv[2])).randrange(320); own = {}\n"
        "def dying(owner, name):\n"
        "    real = getattr(owner, name)\n"
        "    def call(*a, **k):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*a, **k)\n"
        "    setattr(owner, name, call)\n"
        "dying(packs.PackWriter, 'add'); dying(os, 'replace'); dying(os, 'fsync'); dying(os, 'unlink')\n"
        "s.VariantStore(sys.argv[1], fsync=False).pack(shard_bytes=20000)"
    )
    reader = VariantStore(store.root, readonly=True)
    for turn in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(store.root), str(10 * seed + turn)])
        while process.poll() is None:
            assert [int(reader.get_image(RECIPE, key_of(n), n % 3)[0, 0, 0]) for n in range(0, 150, 7)] == before[::7]
        assert process.returncode in (0, -signal.SIGKILL)
        assert answers(VariantStore(store.root), 150)["images"] == before
    store.pack()
    assert answers(store, 150)["images"] == before
    assert store.count() == 150
    assert store.verify().ok
    assert not list(store.root.glob("packs/**/*.tmp"))
    indexes = {path.stem for path in store.root.glob("packs/*/*.idx")}
    assert {path.name.partition("-")[0] for path in store.root.glob("packs/*/*.tar")} == indexes


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from(["put", "fail", "pack", "remove"])), max_size=25)
)
def test_packing_at_any_time_changes_no_answer(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, str]]
) -> None:
    plain, packed = (VariantStore(tmp_path_factory.mktemp("stores") / name, fsync=False) for name in ("plain", "packed"))
    for number, variant, what in steps:
        if what == "pack":
            packed.pack(shard_bytes=3000)
            continue
        for store in (plain, packed):
            if what == "put":
                store.put(RECIPE, key_of(number, str(variant % 2)), variant, image_of(number), Provenance("p"))
            elif what == "fail":
                store.put_failure(RECIPE, key_of(number), variant, ["label"])
            else:
                store.remove(ref for ref in list(store.iter()) if ref.key == key_of(number, "0"))
    one, other = (
        (
            sorted((ref.key, ref.variant, store.data(ref)) for ref in store.iter()),
            sorted((ref.key, ref.variant) for ref in store.iter_failures()),
            [[(ref.key, ref.variant) for ref in store.find(RECIPE, key_of(n)[:-16])] for n in range(6)],
            store.count(),
        )
        for store in (plain, packed)
    )
    assert one == other


def made_up(folder: Path, count: int) -> tuple[Path, list[str]]:
    """An index of variants whose tar file is not there, and some of their keys."""
    keys = [key_of(number) for number in range(min(count, 500))]
    heads = np.random.default_rng(1).integers(0, 2**63, count, "<u8")
    heads[: len(keys)] = [packs._head(key) for key in keys]
    entries = np.zeros(count, packs._ENTRY)
    entries["digits"], entries["length"] = 48, 1
    entries["key"][: len(keys)] = [bytes.fromhex(key.ljust(64, "0")) for key in keys]
    order = np.argsort(heads, kind="stable")
    body = heads[order].tobytes() + entries[order].tobytes()
    folder.mkdir()
    path = folder / f"{count:016x}.idx"
    path.write_bytes(packs._HEADER.pack(packs._MAGIC, packs.VERSION, 1, count, 0, bytes(32)) + body)
    return path, keys


@pytest.mark.timing
def test_a_large_index_is_as_fast_as_a_small_one(tmp_path: Path) -> None:
    indexes = {count: made_up(tmp_path / f"{count}", count) for count in (1_000, 1_000_000)}
    opening, asking = {count: [] for count in indexes}, {count: [] for count in indexes}
    for _ in range(15):
        for count, (path, keys) in indexes.items():
            start = time.perf_counter()
            pack = packs.Pack(path)
            opened = time.perf_counter()
            found = [next(pack.find(key, 0)).length for key in keys]
            asking[count].append(time.perf_counter() - opened)
            opening[count].append(opened - start)
            assert sum(found) == len(keys)
    ratio = statistics.median(large / small for large, small in zip(asking[1_000_000], asking[1_000], strict=True))
    print(f"look-up in a million entries: {ratio:.2f} of that in a thousand, {min(asking[1_000_000]) / 500 * 1e6:.1f} us")
    assert statistics.median(opening[1_000_000]) < 0.02
    assert ratio <= 1.5
