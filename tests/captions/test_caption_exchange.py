"""CaptionStore: metadata.jsonl and Parquet, out and in."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sgid_transforms.captions import CaptionRecord, CaptionStore
from sgid_transforms.errors import StoreError
from sgid_transforms.images.keys import image_key
from sgid_transforms.images.reading import load_image

NASTY = 'a "cat"\non\u2028 a \\ mat\0 \ufffd 猫'


@pytest.fixture
def store(tmp_path):
    store = CaptionStore(tmp_path / "captions.sqlite")
    yield store
    store.close()


@pytest.fixture
def records(tmp_path):
    return [
        CaptionRecord("aa", "a cat", "cat", 0.25, 0.5, "blip", "model", str(tmp_path / "cat" / "1.png")),
        CaptionRecord("bb", NASTY, None, None, None, "me", "human", "/elsewhere/2.png"),
        CaptionRecord("cc", "", source="import", path=str(tmp_path / "3.png")),
    ]


def test_jsonl_has_the_columns_of_imagefolder(tmp_path, store, records):
    store.put_many([*records, CaptionRecord("dd", "without a path")])
    assert store.export_metadata_jsonl(tmp_path / "metadata.jsonl") == 3
    lines = (tmp_path / "metadata.jsonl").read_text("ascii").split("\n")
    assert lines[-1] == ""
    first, second, third = map(json.loads, lines[:-1])
    assert first["file_name"] == "cat/1.png"
    assert first["text"] == "a cat"
    assert second["file_name"] == "/elsewhere/2.png"
    assert second["text"] == NASTY
    assert "label" not in third


def test_jsonl_is_read_by_hugging_face_datasets(tmp_path, store):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
        store.put(CaptionRecord(f"k{i}", f"picture {i}", path=str(folder / f"{i}.png")))
    store.export_metadata_jsonl(folder / "metadata.jsonl")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"]) == ["picture 0", "picture 1"]


def test_jsonl_round_trip(tmp_path, store, records):
    store.put_many(records)
    store.export_metadata_jsonl(tmp_path / "metadata.jsonl")
    again = CaptionStore(tmp_path / "again.sqlite")
    assert again.import_metadata_jsonl(tmp_path / "metadata.jsonl") == 3
    assert list(again) == records
    again.close()


def test_foreign_jsonl_gets_its_keys_from_the_images(tmp_path, store):
    images = [Image.new("RGB", (8, 6), (9, i, 0)) for i in range(2)]
    (tmp_path / "cat").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "cat" / f"{i}.png")
    lines = [json.dumps({"file_name": f"cat/{i}.png", "text": f"cat {i}", "other": [1]}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(lines))
    assert store.import_metadata_jsonl(tmp_path / "metadata.jsonl") == 2
    for i, image in enumerate(images):
        expected = CaptionRecord(image_key(image), f"cat {i}", source="import", path=str(tmp_path / "cat" / f"{i}.png"))
        assert store.get(image_key(image)) == expected


def test_a_key_from_an_image_is_that_of_the_upright_picture_as_for_sgid_generate(tmp_path, store):
    image = Image.new("RGB", (8, 6), (9, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "0.png", exif=exif)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
    store.import_metadata_jsonl(tmp_path / "metadata.jsonl")
    assert store.get(image_key(load_image(tmp_path / "0.png"))) is not None
    assert store.get(image_key(image)) is None


def test_keys_can_be_made_by_the_caller(tmp_path, store):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "x"}')
    store.import_metadata_jsonl(tmp_path / "metadata.jsonl", key=lambda path: path.stem * 4)
    assert store.get("xxxx").caption == "x"


def test_human_captions_survive_an_import(tmp_path, store):
    store.put(CaptionRecord("aa", "mine", source="human"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "theirs", "key": "aa"}')
    store.import_metadata_jsonl(tmp_path / "metadata.jsonl")
    assert store.get("aa").caption == "mine"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[1]", "not a JSON object"),
        ('{"text": "x"}', 'no "file_name"'),
        ('{"file_name": "x.png", "text": 5}', 'no "text"'),
        ('{"file_name": "x.png", "text": "x", "key": 5}', "key 5 is not a string"),
        ('{"file_name": "x.png", "text": "x", "key": "k", "similarity": "high"}', "is not a number"),
        ('{"file_name": "x.png", "text": "x", "key": "k", "label": 5}', "label 5 is a int, not a string"),
        ('{"file_name": "x.png", "text": "x", "key": "k", "source": "robot"}', "source 'robot'"),
        ('{"file_name": "../secret.png", "text": "x"}', "leads out of"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "leads out of"),
        ('{"file_name": "a\\u0000b", "text": "x"}', "is not a path"),
        ('{"file_name": "missing.png", "text": "x"}', "cannot be read"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_imported(tmp_path, store, line, message):
    good = '{"file_name": "x.png", "text": "x", "key": "good"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(StoreError, match=message) as caught:
        store.import_metadata_jsonl(tmp_path / "metadata.jsonl")
    assert "line 2" in str(caught.value)
    assert len(store) == 0


def test_an_image_that_is_a_bomb_is_refused(tmp_path, store, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "bomb.png", "text": "x"}')
    with pytest.raises(StoreError, match=r"bomb\.png': it has more than"):
        store.import_metadata_jsonl(tmp_path / "metadata.jsonl")


def test_bytes_that_are_no_utf8_are_replaced(tmp_path, store):
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "x", "text": "caf\xe9", "key": "k"}')
    store.import_metadata_jsonl(tmp_path / "metadata.jsonl")
    assert store.get("k").caption == "caf\ufffd"


def test_parquet_round_trip(tmp_path, store, records):
    store.put_many(records)
    assert store.export_parquet(tmp_path / "captions.parquet") == 3
    again = CaptionStore(tmp_path / "again.sqlite")
    assert again.import_parquet(tmp_path / "captions.parquet") == 3
    assert list(again) == records
    again.close()


def test_an_empty_store_exports_empty_files(tmp_path, store):
    assert store.export_parquet(tmp_path / "captions.parquet") == 0
    assert store.import_parquet(tmp_path / "captions.parquet") == 0
    assert store.export_metadata_jsonl(tmp_path / "metadata.jsonl") == 0
    assert store.import_metadata_jsonl(tmp_path / "metadata.jsonl") == 0


def test_parquet_takes_a_path_that_is_no_unicode(tmp_path, store):
    store.put(CaptionRecord("aa", "x", path="caf\udce9.png"))
    store.export_parquet(tmp_path / "captions.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "captions.parquet")["path"].to_pylist() == ["caf?.png"]


def test_parquet_of_others_needs_two_columns_only(tmp_path, store):
    pyarrow.parquet.write_table(pyarrow.table({"key": ["aa"], "caption": ["x"], "more": [1]}), tmp_path / "a.parquet")
    store.import_parquet(tmp_path / "a.parquet")
    assert store.get("aa") == CaptionRecord("aa", "x", source="import")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["x"]}, "has no column key"),
        ({"key": ["aa"], "caption": [None]}, "row 1"),
        ({"key": [5], "caption": ["x"]}, "row 1: key 5 is not a string"),
    ],
)
def test_parquet_that_does_not_fit_is_refused(tmp_path, store, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=message):
        store.import_parquet(tmp_path / "a.parquet")
    assert len(store) == 0


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1", None])
def test_what_is_no_parquet_is_refused(tmp_path, store, content):
    if content is not None:
        (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(StoreError, match="could not read"):
        store.import_parquet(tmp_path / "a.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"pip install 'sgid-transforms\[parquet\]'"):
        store.export_parquet(tmp_path / "captions.parquet")


@pytest.mark.parametrize("export", ["export_parquet", "export_metadata_jsonl"])
def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path, store, export):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "folder").mkdir()
    with pytest.raises(StoreError, match="could not write"):
        getattr(store, export)(tmp_path / "out" / "folder")
    with pytest.raises(StoreError, match="could not write"):
        getattr(store, export)(tmp_path / "missing" / "file")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["folder"]


def test_a_missing_file_is_an_error(tmp_path, store):
    with pytest.raises(StoreError, match="could not read"):
        store.import_metadata_jsonl(tmp_path / "metadata.jsonl")
