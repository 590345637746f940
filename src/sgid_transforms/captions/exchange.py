"""Captions in other formats: Hugging Face's ImageFolder ``metadata.jsonl``, and Parquet."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgid_transforms.captions.record import COLUMNS, MAX_TEXT, CaptionRecord, to_row
from sgid_transforms.errors import ImageError, StoreError
from sgid_transforms.files import replacing

_OWN_FIELDS = ("key", "label", "similarity", "rank", "captioner", "source", "context", "contradiction", "words")


def write_jsonl(records: Iterable[CaptionRecord], path: Path) -> int:
    """Write one JSON object per line: ``file_name``, ``text``, then our own fields where they are known.

    See https://huggingface.co/docs/datasets/image_dataset#imagefolder for the format. ASCII escapes keep any text on its line.
    """
    written = 0
    with _writing(path) as temporary, open(temporary, "w", encoding="ascii", newline="\n") as file:
        for record in records:
            if record.path is None:
                continue
            line: dict[str, object] = {"file_name": _relative(record.path, path.parent), "text": record.caption}
            line |= {name: getattr(record, name) for name in _OWN_FIELDS if getattr(record, name) is not None}
            file.write(json.dumps(line) + "\n")
            written += 1
    return written


def read_jsonl(path: Path, key: Callable[[Path], str] | None) -> list[CaptionRecord]:
    """The records of a ``metadata.jsonl``; blank lines are skipped."""
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except OSError as error:
        raise StoreError(f"could not read {path}: {error.strerror or error}; check the path") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records.append(_from_json(line, path.parent, key))
        except (StoreError, ValueError, RecursionError) as error:
            raise StoreError(f"{path}, line {number}: {error}") from error
    return records


def write_parquet(records: Iterable[CaptionRecord], path: Path) -> int:
    """Write a table with one column per field of a record."""
    arrow, parquet = _arrow()
    # to_row makes every text valid Unicode, which Parquet requires; a path may still be bytes.
    rows = [
        tuple(os.fsdecode(v).encode("utf-8", "replace").decode() if isinstance(v, bytes) else v for v in to_row(r))
        for r in records
    ]
    kinds = {"similarity": arrow.float64(), "rank": arrow.float64()}
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in COLUMNS])
    table = arrow.table({name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}, schema=schema)
    with _writing(path) as temporary:
        parquet.write_table(table, temporary)
    return len(rows)


def read_parquet(path: Path) -> list[CaptionRecord]:
    """The records of a Parquet file; columns that are not fields of a record are ignored."""
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
        names = [name for name in COLUMNS if name in table.column_names]
        rows = table.select(names).to_pylist()
    except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
        raise StoreError(f"could not read {path} as Parquet: {error}") from error
    lacking = sorted({"key", "caption"} - set(names))
    if lacking:
        raise StoreError(f"{path} has no column {' and no column '.join(lacking)}; rename its columns")
    records = []
    for number, row in enumerate(rows, 1):
        try:
            records.append(_record(row))
        except StoreError as error:
            raise StoreError(f"{path}, row {number}: {error}") from error
    return records


def _from_json(line: str, folder: Path, key: Callable[[Path], str] | None) -> CaptionRecord:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise StoreError("it is not a JSON object")
    for name in ("file_name", "text"):
        if not isinstance(values.get(name), str):
            raise StoreError(f'it has no "{name}" that is a string')
    file_name = values["file_name"]
    fields = {name: values.get(name) for name in _OWN_FIELDS}
    if fields["key"] is None:
        fields["key"] = (key or _key_of_file)(_inside(folder, file_name))
    path = file_name if "\0" in file_name else os.fspath(folder / file_name)
    return _record(fields | {"caption": values["text"], "path": path})


def _record(fields: dict[str, Any]) -> CaptionRecord:
    """A record of values from outside, checked here so that an error can name its line or row."""
    known = {name: value for name, value in fields.items() if value is not None}
    record = CaptionRecord(**({"key": None, "caption": None, "source": "import"} | known))
    to_row(record)
    return record


def _key_of_file(path: Path) -> str:
    from sgid_transforms.images.keys import image_key
    from sgid_transforms.images.reading import load_image

    try:
        return image_key(load_image(path))
    except ImageError as error:
        raise StoreError(f"its image {os.fspath(path)!r:.200}: {error}") from error


def _inside(folder: Path, file_name: str) -> Path:
    """The image of a line, refused if it lies outside the folder that the file describes."""
    if "\0" in file_name or len(file_name) > MAX_TEXT:
        raise StoreError(f"file_name {file_name!r:.80} is not a path")
    path = folder / file_name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"file_name {file_name!r:.200} leads out of {folder}; give a path below it, or a key")
    return path


def _relative(path: str, folder: Path) -> str:
    try:
        return Path(path).absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return path


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Like ``replacing``, but errors become ``StoreError``."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except StoreError:  # from the store that is being read
        raise
    except OSError as error:
        raise StoreError(f"could not write {path}: {error.strerror or error}; check its folder") from error


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError("Parquet files need pyarrow: pip install 'sgid-transforms[parquet]'") from error
    return pyarrow, pyarrow.parquet
