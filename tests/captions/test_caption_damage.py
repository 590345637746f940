"""Damaged caption stores: a wrong text never comes back; what can be saved is saved."""

import logging
import random
import shutil
import sqlite3
from dataclasses import fields, replace

import pytest

from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.captions.record import COLUMNS, FOREIGN, digest_of, from_row, to_row
from sgid_transforms.errors import StoreError

FULL = CaptionRecord("ab12", "a cat on a mat", "cat", 0.25, 0.5, "blip", "model", "train/cat/1.png", "clip", "a photo of a cat")
RECORDS = [
    replace(FULL, key=f"{i * 0x01234567 % 2**32:08x}", caption=f"picture {i} " + "of a cat " * 9, similarity=i / 1000)
    for i in range(1000)
]
OTHERS = {
    "caption": "a dog on a mat", "label": "dog", "similarity": 0.75, "rank": 0.25, "captioner": "human", "source": "human",
    "path": "train/dog/1.png", "scorer": "other", "prompt": "a photo of a dog",
    "context": "on a mat", "contradiction": "words", "words": "puppy",
}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    yield store
    store.close()


def damage(path, change, *parameters):
    """Change rows as rot does: unseen by the file's own trigger."""
    raw = sqlite3.connect(path)
    (trigger,) = raw.execute("SELECT sql FROM sqlite_master WHERE name = 'edited'").fetchone()
    with raw:
        raw.execute("DROP TRIGGER edited")
        raw.execute(f"UPDATE captions SET {change}", parameters)
        raw.execute(trigger)
    raw.close()


def flip(path, rng, count=1):
    data = bytearray(path.read_bytes())
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_the_cases_cover_every_field():
    assert set(OTHERS) == {field.name for field in fields(CaptionRecord)} - {"key"}


class TestRows:
    @pytest.mark.parametrize("name", OTHERS)
    def test_a_changed_field_makes_the_record_missing(self, store, name, caplog):
        store.put_many([FULL, replace(FULL, key="cd34")])
        damage(store.path, f"{name} = ? WHERE key = 'ab12'", OTHERS[name])
        with caplog.at_level(logging.WARNING):
            assert store.get("ab12") is None
            assert store.get_many(["ab12", "cd34"]) == {"cd34": replace(FULL, key="cd34")}
            assert [record.key for record in store] == ["cd34"]
            assert store.missing(["ab12", "cd34"]) == ["ab12"]
        assert store.damaged_seen == 4
        assert [record.message for record in caplog.records] == [
            f"the record of image ab12 in {store.path} is damaged and counts as missing (further ones are not logged)"
        ]

    @pytest.mark.parametrize("value", [b"a c\xff\xfet", 7, 0.5, b"", ""], ids=repr)
    def test_so_does_a_field_of_another_kind(self, store, value):
        store.put(FULL)
        damage(store.path, "caption = ?", value)
        assert store.get("ab12") is None

    @pytest.mark.parametrize("source", ["model", "human"])
    def test_what_is_written_anew_replaces_it_and_builds_on_nothing_of_it(self, store, source):
        store.put(replace(FULL, source=source))
        damage(store.path, "label = 'dog'")
        fresh = CaptionRecord("ab12", FULL.caption, captioner="blip")
        store.put(fresh)
        assert store.get("ab12") == fresh
        with store._database.reading() as connection:  # kept for people
            assert connection.execute("SELECT key, label FROM damaged").fetchall() == [("ab12", "dog")]

    @pytest.mark.parametrize(
        "write",
        [
            lambda store: store.set_similarities({"ab12": 0.5}),
            lambda store: store.set_ranks(),
            lambda store: store.set_ranks(keep=True),
            lambda store: store.put(replace(FULL, caption="other", source="model")),
        ],
    )
    def test_no_write_gives_a_damaged_row_a_digest_that_fits(self, store, write):
        store.put_many([replace(FULL, source="human"), replace(FULL, key="cd34")])
        damage(store.path, "caption = 'a dog' WHERE key = 'ab12'")
        write(store)
        found = store.get("ab12")
        assert found is None or found.caption == "other"
        assert store.get("cd34") is not None

    def test_a_damaged_key_is_found_by_no_key_and_ends_no_walk(self, store):
        store.put_many([FULL, replace(FULL, key="cd34")])
        damage(store.path, "key = CAST(x'ff3132' AS TEXT) WHERE key = 'ab12'")
        assert [record.key for record in store] == ["cd34"]
        assert store.verify(repair=True).damaged == ("�12",)
        assert store.verify().ok
        assert len(store) == 1

    def test_a_merge_takes_no_damaged_row_from_either_side(self, store, tmp_path):
        other = CaptionStore(tmp_path / "other.sqlite")
        store.put(replace(FULL, label=None))
        other.put_many([FULL, replace(FULL, key="cd34")])
        damage(store.path, "caption = 'rot'")
        damage(other.path, "caption = 'rot' WHERE key = 'cd34'")
        store.merge(other)
        assert list(store) == [FULL]

    def test_what_other_programs_write_counts(self, store):
        store.put(FULL)
        store.close()
        raw = sqlite3.connect(store.path)
        with raw:
            raw.execute("INSERT INTO captions (key, caption, captioner, source) VALUES ('ef', 'a bird', '', 'human')")
            raw.execute("UPDATE captions SET caption = 'my cat', source = 'human' WHERE key = 'ab12'")
        raw.close()
        assert store.get("ef") == CaptionRecord("ef", "a bird", source="human")
        assert store.get("ab12").caption == "my cat"
        assert store.verify().ok
        store.set_similarities({"ab12": 0.5})
        damage(store.path, "caption = 'rot'")  # from then on it has a digest
        assert store.get("ab12") is None

    def test_the_digest_is_that_of_earlier_runs(self):
        """Written into files: it must never change."""
        assert digest_of(to_row(FULL)) == 3601570009
        assert digest_of(to_row(CaptionRecord("ef", "ünï", path="a/\udcff"))) == 3646284298
        with_context = CaptionRecord("ef", "a dog on grass", label="dog", context="on grass", contradiction="words")
        assert digest_of(to_row(with_context)) == 1913417033
        assert digest_of(to_row(replace(with_context, words="puppy"))) == 313532962

    def test_values_do_not_run_into_each_other(self):
        row = to_row(FULL)
        swapped = (row[0], row[1] + "cat", "", *row[3:])
        assert digest_of(swapped) != digest_of((row[0], row[1], "cat", *row[3:]))
        assert from_row((*row, digest_of(row))) == FULL


class TestOlderStores:
    @pytest.mark.parametrize("version", [1, 2])
    def test_are_read_as_they_are_and_get_digests_when_they_are_written(self, tmp_path, version):
        path = tmp_path / "old.sqlite"
        columns = COLUMNS[: 10 if version == 2 else 8]
        raw = sqlite3.connect(path)
        with raw:
            raw.execute(f"CREATE TABLE captions ({', '.join(columns)}, PRIMARY KEY (key)) WITHOUT ROWID")
            raw.execute(f"INSERT INTO captions VALUES ({', '.join('?' * len(columns))})", to_row(FULL)[: len(columns)])
            raw.execute(f"PRAGMA application_id={0x53474944}")
            raw.execute(f"PRAGMA user_version={version}")
        raw.close()
        expected = FULL if version == 2 else replace(FULL, scorer=None, prompt=None)
        assert CaptionStore(path, readonly=True).get("ab12") == expected
        store = CaptionStore(path)
        assert store.get("ab12") == expected
        damage(store.path, "label = 'dog'")
        assert store.get("ab12") is None

    @pytest.mark.parametrize(("version", "known"), [(3, FULL), (4, replace(FULL, contradiction="words"))])
    def test_earlier_digests_hold(self, tmp_path, version, known):
        """Nothing that was damaged before the file is upgraded may pass for sound after it."""
        path = tmp_path / "old.sqlite"
        columns = COLUMNS[: 10 if version == 3 else 12]
        rows = [to_row(replace(known, key=key))[: len(columns)] for key in ("ab12", "cd34")]
        raw = sqlite3.connect(path)
        with raw:
            raw.execute(f"CREATE TABLE captions ({', '.join(columns)}, digest, PRIMARY KEY (key)) WITHOUT ROWID")
            raw.execute("CREATE TABLE damaged AS SELECT * FROM captions")
            mark = f"UPDATE captions SET digest = {FOREIGN} WHERE key = NEW.key"
            marks = ", ".join("?" * (len(columns) + 1))
            raw.executemany(f"INSERT INTO captions VALUES ({marks})", [(*row, digest_of(row)) for row in rows])
            raw.execute("UPDATE captions SET label = 'dog' WHERE key = 'cd34'")
            raw.execute(f"CREATE TRIGGER edited AFTER UPDATE OF label ON captions BEGIN {mark}; END")
            raw.execute(f"CREATE TRIGGER inserted AFTER INSERT ON captions BEGIN {mark}; END")
        raw.close()
        for store in (CaptionStore(path, readonly=True), CaptionStore(path)):
            assert (store.get("ab12"), store.get("cd34")) == (known, None)
        store.put(replace(FULL, key="cd34", context="on a mat", words="puppy"))
        assert store.contexts() == [("cd34", "cat", "on a mat")]
        assert store.verify().ok
        damage(path, "words = 'kitten' WHERE key = 'cd34'")
        assert store.get("cd34") is None


class TestFiles:
    @pytest.mark.parametrize("part", ["", "-wal"])
    def test_no_flipped_bit_ever_gives_a_wrong_record(self, tmp_path, part):
        """Each try either gives the record as it was written, none, or a StoreError."""
        whole = tmp_path / "whole.sqlite"
        store = CaptionStore(whole)
        store.put_many(RECORDS[:500])
        if part:  # the second half stays in the log while the connection is open
            store.put_many(RECORDS[500:])
        else:
            store.put_many(RECORDS[500:])
            store.close()
        right, rng, wrong, gone = {record.key: record for record in RECORDS}, random.Random(7), 0, 0
        for number in range(60):
            path = tmp_path / f"{number}.sqlite"
            for end in ("", "-wal"):
                if (source := whole.with_name(whole.name + end)).exists():
                    shutil.copy(source, path.with_name(path.name + end))
            flip(path.with_name(path.name + part), rng, count=30)
            damaged = CaptionStore(path)
            try:
                found = damaged.get_many(right)
                found |= {record.key: record for record in damaged}
                wrong += sum(record != right[key] for key, record in found.items())
                gone += len(right) - len(found)
            except StoreError:
                gone += 1
            damaged.close()
        store.close()
        assert wrong == 0
        assert gone > 0

    def test_repair_saves_what_can_be_read_and_keeps_the_old_file(self, store):
        store.put_many(RECORDS)
        store.close()
        data = bytearray(store.path.read_bytes())
        data[5 * 4096 : 6 * 4096] = bytes(4096)  # a page of the middle
        store.path.write_bytes(data)
        report = store.verify()
        assert report.broken
        assert not report.ok
        assert 0 < report.checked < len(RECORDS)
        with pytest.raises(StoreError, match="sgid verify --captions FILE --repair"):
            list(store)
        store.verify(repair=True)
        assert store.verify().ok
        saved = list(store)
        assert len(saved) == report.checked
        assert set(saved) <= set(RECORDS)
        assert store.path.with_name("captions.sqlite.damaged").read_bytes() == bytes(data)

    def test_a_second_repair_does_not_overwrite_what_the_first_one_kept(self, store):
        for _ in range(2):
            store.put_many(RECORDS)
            store.close()
            data = bytearray(store.path.read_bytes())
            data[5 * 4096 : 6 * 4096] = bytes(4096)
            store.path.write_bytes(data)
            if store.path.with_name("captions.sqlite.damaged").exists():
                with pytest.raises(StoreError, match=r"captions.sqlite.damaged is there from an earlier repair"):
                    store.verify(repair=True)
            else:
                store.verify(repair=True)

    @pytest.mark.parametrize("byte", [*range(60, 64), *range(68, 72)])
    def test_no_bit_of_the_headers_ids_closes_the_store(self, store, byte):
        store.put(FULL)
        store.close()
        whole = store.path.read_bytes()
        for bit in range(8):
            data = bytearray(whole)
            data[byte] ^= 1 << bit
            store.path.write_bytes(data)
            assert store.get("ab12") == FULL
            store.put(replace(FULL, key="cd34"))
            assert len(store) == 2
            store.close()

    @pytest.mark.parametrize(
        ("damage", "least"),
        [
            (lambda data: b"?" + data[1:], 1000),  # not a SQLite file any more
            (lambda data: data.replace(b"CREATE TABLE captions", b"CREATE TABLF captions"), 1000),
            (lambda data: data.replace(b"tablecaptionscaptions", b"tablecaptionscapt\xffons"), 1000),
            (lambda data: data[: len(data) // 2 // 4096 * 4096], 0),  # the upper pages of the tree are at the end
            (lambda data: data[: 9 * 4096] + bytes(4096) + data[10 * 4096 :], 900),
            (lambda data: data[: 9 * 4096] + bytes(4096) + data[10 * 4096 : -5 * 4096] + bytes(5 * 4096), 500),
        ],
        ids=["magic", "schema", "name", "cut in half", "page", "pages"],
    )
    def test_repair_brings_a_store_back_from(self, store, damage, least):
        store.put_many(RECORDS)
        store.close()
        store.path.write_bytes(damage(store.path.read_bytes()))
        assert not store.verify().ok
        store.verify(repair=True)
        assert store.verify().ok
        assert len(store) >= least
        assert set(store) <= set(RECORDS)

    def test_keys_of_other_kinds_are_saved_around_a_damaged_page(self, store):
        records = [replace(FULL, key=f"photo-{number:04d}", caption="of a cat " * 40) for number in range(500)]
        store.put_many(records)
        store.close()
        data = bytearray(store.path.read_bytes())
        data[9 * 4096 : 10 * 4096] = bytes(4096)
        store.path.write_bytes(data)
        store.verify(repair=True)
        assert len(store) > 480

    def test_a_file_of_which_nothing_can_be_read_leaves_an_empty_store_and_is_kept(self, store):
        store.put(FULL)
        store.close()
        data = store.path.read_bytes()[:4096] + bytes(4096) * 3
        store.path.write_bytes(data)
        assert store.verify(repair=True).broken
        assert len(store) == 0
        assert store.path.with_name("captions.sqlite.damaged").read_bytes() == data

    def test_a_store_that_is_not_there_is_not_made(self, store):
        with pytest.raises(StoreError, match="there is no caption store at"):
            store.verify(repair=True)
        assert not store.path.exists()

    def test_a_whole_store_is_whole(self, store):
        store.put_many(RECORDS)
        report = store.verify()
        assert report.ok
        assert report.checked == len(RECORDS)
        assert CaptionStore(store.path, readonly=True).verify() == report
