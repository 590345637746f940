"""CaptionStore: what is stored, what wins, what is refused."""

import pickle
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.errors import StoreError
from sgid_transforms.recipe.guidance import rank_similarities

FULL = CaptionRecord("ab12", "a cat on a mat", "cat", 0.25, 0.5, "blip", "model", "train/cat/1.png")


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    yield store
    store.close()


def test_nothing_is_opened_before_the_first_use(tmp_path):
    CaptionStore(tmp_path / "new" / "captions.sqlite")
    assert not (tmp_path / "new").exists()


def test_records_come_back_as_they_were(store):
    bare = CaptionRecord("cd34", "")
    store.put_many([FULL, bare])
    assert store.get("ab12") == FULL
    assert store.get("cd34") == bare
    assert store.get("ef56") is None
    assert store.get_many(["ab12", "ef56", "cd34"]) == {"ab12": FULL, "cd34": bare}
    assert list(store) == [FULL, bare]
    assert len(store) == 2
    assert "ab12" in store
    assert "ef56" not in store
    assert 7 not in store
    assert bool(store)


def test_an_empty_store_is_still_true_so_that_or_defaults_do_not_replace_it(store):
    assert len(store) == 0
    assert store


def test_records_outlive_the_object(store):
    store.put(FULL)
    store.close()
    assert CaptionStore(store.path).get("ab12") == FULL
    assert store.get("ab12") == FULL  # a closed store opens again


def test_similarities_without_a_rank_are_known(store):
    assert not store.lacks_ranks()
    store.put_many([FULL, CaptionRecord("cd34", "no score")])
    assert not store.lacks_ranks()
    store.set_similarities({"cd34": 0.5})
    assert store.lacks_ranks()
    store.set_ranks(keep=True)
    assert not store.lacks_ranks()


def test_thousands_of_keys_at_once(store):
    records = [CaptionRecord(f"{i:08x}", f"caption {i}") for i in range(2345)]
    store.put_many(records)
    assert list(store) == records
    wanted = [f"{i:08x}" for i in range(2340, 2350)] + [f"{i:08x}" for i in range(1200)]
    assert len(store.get_many(wanted)) == 1205
    assert store.missing(wanted) == [f"{i:08x}" for i in range(2345, 2350)]


def test_missing_keeps_the_order_and_names_each_key_once(store):
    store.put(FULL)
    assert store.missing(["ff", "ab12", "aa", "ff"]) == ["ff", "aa"]


def test_iteration_goes_on_while_the_store_is_written(store):
    store.put_many(CaptionRecord(f"{i:04d}", "old") for i in range(1200))
    seen = []
    for record in store:
        if record.key == "0000":
            store.put_many([CaptionRecord("1100", "new"), CaptionRecord("9999", "late")])
        seen.append(record)
    assert len(seen) == 1201
    assert {r.caption for r in seen if r.key in ("1100", "9999")} == {"new", "late"}


class TestPrecedence:
    def test_a_captioner_never_replaces_a_human_caption(self, store):
        human = replace(FULL, caption="my cat", source="human", captioner="me", similarity=None, rank=None)
        store.put(human)
        store.put(replace(FULL, caption="a dog", similarity=0.9, rank=1.0))
        assert store.get("ab12") == human
        store.put(replace(FULL, caption="a dog", source="import"))
        assert store.get("ab12") == human

    def test_the_similarity_of_a_human_caption_can_be_updated(self, store):
        human = CaptionRecord("ab12", "my cat", source="human")
        store.put(human)
        store.put(CaptionRecord("ab12", "my cat", similarity=0.5, rank=0.1))
        assert store.get("ab12") == replace(human, similarity=0.5, rank=0.1)
        store.set_similarities({"ab12": 0.75, "unknown": 1.0})
        assert store.get("ab12") == replace(human, similarity=0.75)
        assert len(store) == 1

    def test_a_human_caption_replaces_all_others(self, store):
        for first in ("model", "import", "human"):
            store.put(replace(FULL, source=first))
            store.put(CaptionRecord("ab12", "my cat", source="human", captioner="me"))
            assert store.get("ab12") == replace(
                FULL, caption="my cat", source="human", captioner="me", similarity=None, rank=None
            )
            store.remove(["ab12"])

    def test_a_new_text_drops_scores_and_keeps_label_and_path(self, store):
        store.put(FULL)
        store.put(CaptionRecord("ab12", "another cat", captioner="blip-2"))
        assert store.get("ab12") == replace(FULL, caption="another cat", captioner="blip-2", similarity=None, rank=None)

    def test_the_same_text_keeps_scores_but_a_new_similarity_drops_the_old_rank(self, store):
        store.put(FULL)
        store.put(CaptionRecord("ab12", FULL.caption, captioner="blip"))
        assert store.get("ab12") == FULL
        store.put(CaptionRecord("ab12", FULL.caption, similarity=0.3, captioner="blip"))
        assert store.get("ab12") == replace(FULL, similarity=0.3, rank=None)

    def test_one_bad_record_keeps_the_whole_batch_out(self, store):
        with pytest.raises(StoreError, match="source 'robot'"):
            store.put_many([FULL, replace(FULL, key="cd", source="robot")])
        assert len(store) == 0


class TestRanks:
    def test_ranks_are_those_of_the_guidance_module_and_persist(self, store):
        values = [0.3, 0.1, None, 0.3, 0.9]
        store.put_many(CaptionRecord(f"k{i}", "x", similarity=v, rank=0.123) for i, v in enumerate(values))
        assert store.set_ranks() == 4
        store.close()
        assert [record.rank for record in CaptionStore(store.path)] == rank_similarities(values)

    def test_an_empty_store_has_none(self, store):
        assert store.set_ranks() == 0


class TestMerge:
    def test_humans_win_then_the_store_that_is_merged_into(self, tmp_path, store):
        other = CaptionStore(tmp_path / "other.sqlite")
        store.put_many(
            [
                CaptionRecord("both-models", "mine"),
                CaptionRecord("my-human", "mine", source="human"),
                CaptionRecord("their-human", "mine", "cat", similarity=0.5, captioner="blip", path="a.png"),
                CaptionRecord("two-humans", "mine", source="human"),
                CaptionRecord("same-text", "same"),
                CaptionRecord("only-mine", "mine"),
            ]
        )
        other.put_many(
            [
                CaptionRecord("both-models", "theirs", label="dog", similarity=0.9),
                CaptionRecord("my-human", "theirs"),
                CaptionRecord("their-human", "theirs", captioner="you", source="human"),
                CaptionRecord("two-humans", "theirs", source="human"),
                CaptionRecord("same-text", "same", similarity=0.4, rank=0.2),
                CaptionRecord("only-theirs", "theirs", path="b.png"),
            ]
        )
        store.merge(other)
        expected = [
            CaptionRecord("both-models", "mine", label="dog"),
            CaptionRecord("my-human", "mine", source="human"),
            CaptionRecord("their-human", "theirs", "cat", captioner="you", source="human", path="a.png"),
            CaptionRecord("two-humans", "mine", source="human"),
            CaptionRecord("same-text", "same", similarity=0.4, rank=0.2),
            CaptionRecord("only-mine", "mine"),
            CaptionRecord("only-theirs", "theirs", path="b.png"),
        ]
        assert list(store) == sorted(expected, key=lambda record: record.key)
        store.merge(other.path)
        assert list(store) == sorted(expected, key=lambda record: record.key)
        assert len(other) == 6
        other.close()

    def test_a_missing_other_store_is_an_error_and_no_new_file(self, tmp_path, store):
        with pytest.raises(StoreError, match=r"there is no caption store at .*nowhere"):
            store.merge(tmp_path / "nowhere.sqlite")
        assert not (tmp_path / "nowhere.sqlite").exists()


class TestHostileInput:
    SQL = "'); DROP TABLE captions; --"
    NASTY = ("../../etc/passwd", "a\0b", SQL, '"', "\n\r\t", "\x1b[31m", "\u202e", "x" * 100_000, "猫😀", "%s {label}")

    @pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
    def test_any_text_is_stored_as_it_is(self, store, text):
        record = CaptionRecord("ab", text, text, captioner=text, path=text)
        store.put(record)
        store.close()
        assert CaptionStore(store.path).get("ab") == record
        assert [r.key for r in store] == ["ab"]

    def test_half_characters_become_replacement_characters_but_a_path_keeps_its_bytes(self, store):
        path = "caf\udce9/\udcff.png"  # what os.fsdecode makes of Latin-1 file names
        store.put(CaptionRecord("ab", "a \ud83d cat", "\udcff", captioner="\udcff", path=path))
        assert store.get("ab") == CaptionRecord("ab", "a \ufffd cat", "\ufffd", captioner="\ufffd", path=path)
        store.put(CaptionRecord("ab", "a cat", path="\ud83d.png"))  # no file name decodes to that
        assert store.get("ab").path == "\ufffd.png"

    @pytest.mark.parametrize("key", ["", "x" * 513, "\udcff", None, 7, b"ab"])
    def test_impossible_keys_are_refused(self, store, key):
        for call in (
            lambda: store.put(CaptionRecord(key, "x")),
            lambda: store.get(key),
            lambda: store.get_many([key]),
            lambda: store.missing([key]),
            lambda: store.remove([key]),
            lambda: store.set_similarities({key: 0.5}),
        ):
            with pytest.raises(StoreError, match="use image_key"):
                call()

    @pytest.mark.parametrize("key", [SQL, "../x", "a\0b", "\n"])
    def test_odd_keys_are_only_text(self, store, key):
        store.put(CaptionRecord(key, "odd"))
        assert store.get(key) == CaptionRecord(key, "odd")
        assert store.missing([key]) == []
        assert [r.key for r in store] == [key]

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("caption", None, "is None"),
            ("caption", 7, "not a string"),
            ("caption", "x" * (2**20 + 1), "1048576 is the limit"),
            ("label", b"cat", "not a string"),
            ("similarity", "0.5", "is not a number"),
            ("rank", True, "is not a number"),
            ("path", 3, "not a string"),
            ("source", "HUMAN", "use one of model, human, import"),
        ],
    )
    def test_wrong_fields_are_refused_by_a_sentence(self, store, field, value, message):
        with pytest.raises(StoreError, match=message):
            store.put(replace(FULL, **{field: value}))
        assert len(store) == 0

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
    def test_a_score_that_is_not_finite_is_none(self, store, value):
        store.put(replace(FULL, similarity=value, rank=value))
        assert store.get("ab12") == replace(FULL, similarity=None, rank=None)

    @given(
        caption=st.text(st.characters(exclude_categories=())),
        label=st.none() | st.text(),
        path=st.none() | st.text(),
        similarity=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_whatever_is_put_can_be_read_and_exported_again(self, tmp_path, store, caption, label, path, similarity):
        store.remove(["k"])
        store.put(CaptionRecord("k", caption, label, similarity, path=path))
        record = store.get("k")
        assert (record.label, record.similarity, record.path) == (label, similarity, path)
        assert len(record.caption) == len(caption)
        record.caption.encode()
        assert store.export_metadata_jsonl(tmp_path / "metadata.jsonl") == (path is not None)


class TestFiles:
    def test_a_newer_schema_is_refused_with_the_way_out(self, store):
        store.put(FULL)
        store.close()
        with sqlite3.connect(store.path) as raw:
            raw.execute("ALTER TABLE captions ADD COLUMN mood TEXT")
        raw.close()
        for readonly in (False, True):
            with pytest.raises(StoreError, match="was written by a later version; upgrade sgid-transforms"):
                CaptionStore(store.path, readonly=readonly).get("ab12")

    def test_another_sqlite_file_is_left_alone(self, tmp_path):
        path = tmp_path / "other.sqlite"
        with sqlite3.connect(path) as raw:
            raw.execute("CREATE TABLE mine (x)")
        raw.close()
        before = path.read_bytes()
        with pytest.raises(StoreError, match="is a SQLite file, but not a caption store"):
            CaptionStore(path).put(FULL)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("content", [b"not a database at all" * 100, b"\x80\x04\x95pickle" * 50])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        path = tmp_path / "captions.sqlite"
        path.write_bytes(content)
        for readonly in (False, True):
            with pytest.raises(StoreError, match="not a SQLite file"):
                CaptionStore(path, readonly=readonly).get("ab")
        assert path.read_bytes() == content

    def test_a_damaged_file_is_an_error_not_a_crash(self, store):
        store.put_many(CaptionRecord(f"{i:032x}", "x" * 100) for i in range(200))
        store.close()
        whole = store.path.read_bytes()
        store.path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
        with pytest.raises(StoreError, match="damaged"):
            list(CaptionStore(store.path))

    def test_a_missing_file_is_an_error_when_readonly(self, tmp_path):
        with pytest.raises(StoreError, match="there is no caption store at"):
            CaptionStore(tmp_path / "captions.sqlite", readonly=True).get("ab")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_file_becomes_a_store_unless_readonly(self, tmp_path):
        path = tmp_path / "captions.sqlite"
        path.touch()
        with pytest.raises(StoreError, match="is empty"):
            CaptionStore(path, readonly=True).get("ab")
        CaptionStore(path).put(FULL)
        assert CaptionStore(path, readonly=True).get("ab12") == FULL

    def test_readonly_refuses_every_write(self, store):
        store.put(FULL)
        reader = CaptionStore(store.path, readonly=True)
        for write in (
            lambda: reader.put(FULL),
            lambda: reader.set_ranks(),
            lambda: reader.remove(["ab12"]),
            lambda: reader.set_similarities({}),
            lambda: reader.merge(store),
        ):
            with pytest.raises(StoreError, match="opened with readonly=True"):
                write()
        store.put(replace(FULL, caption="newer"))
        assert reader.get("ab12").caption == "newer"

    def test_a_folder_that_is_a_file_is_an_error(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(StoreError):
            CaptionStore(tmp_path / "file" / "captions.sqlite").put(FULL)

    @pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
    def test_impossible_paths_are_refused(self, path):
        with pytest.raises(StoreError, match="choose another one"):
            CaptionStore(path)

    @pytest.mark.parametrize("name", ["what?mode=memory#x%41.sqlite", "space and ünïcode.sqlite"])
    def test_the_path_is_a_path_and_no_part_of_a_uri(self, tmp_path, name):
        CaptionStore(tmp_path / name).put(FULL)
        assert (tmp_path / name).is_file()

    def test_pickle_is_small_and_holds_no_connection(self, store):
        store.put(FULL)
        data = pickle.dumps(store)
        assert len(data) < 1000
        again = pickle.loads(data)  # noqa: S301
        assert again.get("ab12") == FULL
        assert repr(again) == repr(store) == f"CaptionStore({str(store.path)!r})"
        assert pickle.loads(pickle.dumps(CaptionStore("x", readonly=True))).readonly  # noqa: S301
