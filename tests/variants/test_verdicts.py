import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import VariantStore
from sgid_transforms.variants.provenance import Provenance
from sgid_transforms.variants.verdicts import FILE, Verdict, VerdictLog

RECIPE, KEY = "01" + "ab" * 11, "0f" * 24


def verdict(decision="reject", who="anna", when=1.0, variant=0, key=KEY, why=""):
    return Verdict(RECIPE, key, variant, decision, who, when, why)


@pytest.fixture
def store(tmp_path):
    return VariantStore(tmp_path / "variants")


class TestWhatCounts:
    def test_the_newest_verdict_of_anybody(self, store):
        store.judge([verdict(when=1), verdict("keep", "ben", when=2)])
        assert store.verdicts()[RECIPE, KEY, 0].decision == "keep"
        store.judge([verdict(when=3)])
        assert store.rejections(RECIPE) == {KEY[:32]: {(KEY, 0)}}

    def test_who_takes_a_verdict_back_leaves_those_of_the_others(self, store):
        store.judge([verdict("keep", "ben", when=1), verdict(when=2), verdict("none", when=3)])
        assert store.verdicts()[RECIPE, KEY, 0].who == "ben"
        store.judge([verdict("none", "ben", when=4)])
        assert store.verdicts() == {}
        assert len(store.all_verdicts()) == 4

    def test_another_process_is_seen_at_once(self, store):
        assert store.rejections(RECIPE) == {}
        VariantStore(store.root).judge([verdict(why="that is a dog")])
        assert store.verdicts()[RECIPE, KEY, 0].why == "that is a dog"
        (store.root / FILE).unlink()
        assert store.rejections(RECIPE) == {}

    def test_it_comes_with_the_variant(self, store):
        store.put(RECIPE, KEY, 0, torch.zeros(3, 8, 8, dtype=torch.uint8), Provenance("a cat"))
        assert store.get(RECIPE, KEY, 0).verdict is None
        store.judge([verdict("keep")])
        assert store.get(RECIPE, KEY, 0).verdict.who == "anna"


@given(st.text(min_size=1).filter(str.strip), st.text(), st.floats(0, 1e11), st.integers(0, 10**9 - 1))
def test_any_text_survives_its_line(who, why, when, variant):
    one = verdict("keep", who, when, variant, why=why)
    line = one.line()
    assert line.count(b"\n") == 1
    assert Verdict.from_line(line.rstrip(b"\n")) == one


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_no_line_raises(line):
    assert Verdict.from_line(line) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decision": "maybe"}, "'maybe' is unknown; use one of reject, keep, none"),
        ({"who": "  "}, "needs the name of the person"),
        ({"when": float("nan")}, "pass seconds since 1970"),
        ({"key": "../../etc/passwd"}, "is not 8 to 64 lowercase hex digits"),
        ({"why": 3}, "why is 3; pass a text"),
    ],
)
def test_what_cannot_be_stored_is_refused(change, message):
    with pytest.raises(StoreError, match=message):
        verdict(**change)


class TestFiles:
    def test_a_flipped_bit_loses_its_own_line_only_and_is_reported(self, store, caplog):
        store.judge(verdict(variant=number) for number in range(20))
        data, rng = bytearray((store.root / FILE).read_bytes()), random.Random(1)
        lines = bytes(data).split(b"\n")
        place = rng.randrange(len(lines[0]))
        data[place] ^= 1 << rng.randrange(6)
        (store.root / FILE).write_bytes(data)
        store = VariantStore(store.root)
        assert {one.variant for one in store.all_verdicts()} == set(range(1, 20))
        assert "1 of 20 verdicts" in caplog.text
        assert store.verify().damaged == (store.root / FILE,)

    def test_an_unfinished_line_does_not_count_and_is_cut_off_by_the_next_writer(self, store):
        store.judge([verdict(variant=1)])
        with open(store.root / FILE, "ab") as file:
            file.write(verdict(variant=2).line()[:50])
        assert [one.variant for one in store.all_verdicts()] == [1]
        store.judge([verdict(variant=3)])
        assert [one.variant for one in store.all_verdicts()] == [1, 3]
        assert (store.root / FILE).read_bytes().count(b"\n") == 2

    def test_many_writers_lose_nothing(self, store):
        def write(person):
            own = VariantStore(store.root)
            for number in range(50):
                own.judge([verdict(who=f"person {person}", variant=number)])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        assert len(set(store.all_verdicts())) == 400

    def test_no_verdict_that_was_confirmed_is_lost_when_its_writer_is_killed(self, store):
        """Each process prints the numbers that were stored and is killed at a random point among them."""
        code = (
            "import sys\n"
            "from sgid_transforms.variants import VariantStore\n"
            "from sgid_transforms.variants.verdicts import Verdict\n"
            "store = VariantStore(sys.argv[1])\n"
            "for number in range(int(sys.argv[2]), 10**9):\n"
            f"    store.judge([Verdict({RECIPE!r}, {KEY!r}, number, 'reject', 'anna', 1.0)])\n"
            "    print(number, flush=True)\n"
        )
        rng, confirmed = random.Random(3), set()
        for start in range(0, 4000, 1000):
            with subprocess.Popen(
                [sys.executable, "-c", code, str(store.root), str(start)], stdout=subprocess.PIPE, text=True
            ) as process:
                for _ in range(rng.randrange(1, 60)):
                    confirmed.add(int(process.stdout.readline()))
                process.kill()
        found = {one.variant for one in store.all_verdicts()}
        assert confirmed <= found
        store.judge([verdict(variant=999_999)])
        assert store.verify().ok

    def test_a_store_that_cannot_be_written_says_so(self, tmp_path, store):
        store.judge([verdict()])
        (store.root / FILE).unlink()
        (store.root / FILE).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match="the verdicts could not be written into"):
            store.judge([verdict()])
        assert not (tmp_path / "elsewhere").exists()
        with pytest.raises(StoreError, match="readonly=True"):
            VariantStore(store.root, readonly=True).judge([verdict()])

    def test_a_merge_brings_the_verdicts_along_once(self, tmp_path, store):
        other = VariantStore(tmp_path / "other")
        other.judge([verdict(variant=1), verdict(variant=2)])
        store.judge([verdict(variant=2)])
        for _ in range(2):
            store.merge(other)
        assert sorted(one.variant for one in store.all_verdicts()) == [1, 2]

    def test_pruning_keeps_them(self, store):
        store.judge([verdict()])
        store.prune("02" + "cd" * 11)
        assert VerdictLog(str(store.root / FILE)).read() == (verdict(),)


def test_the_variants_of_an_image_are_found_without_walking_the_store(store):
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for key in (KEY, KEY[:32] + "ab" * 8, KEY[:30] + "ff" + KEY[32:]):
        for number in (10, 2):
            store.put(RECIPE, key, number, picture, Provenance("a cat"))
    store.put_failure(RECIPE, KEY, 3, ["black"])
    assert [(ref.key, ref.variant) for ref in store.find(RECIPE, KEY[:32])] == [
        (KEY, 2), (KEY[:32] + "ab" * 8, 2), (KEY, 10), (KEY[:32] + "ab" * 8, 10),
    ]  # fmt: skip
    assert store.find(RECIPE, "ab" * 16) == []
