"""Captions, labels and similarities by image key, in one SQLite file."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgid_transforms.captions import exchange
from sgid_transforms.captions.database import Database, in_chunks
from sgid_transforms.captions.record import COLUMNS, CaptionRecord, check_key, from_row, to_row
from sgid_transforms.errors import StoreError
from sgid_transforms.recipe.guidance import rank_similarities

_log = logging.getLogger("sgid_transforms")

_ALL = ", ".join(COLUMNS)
_SELECT = f"SELECT {_ALL}, digest FROM captions"
_GET = f"{_SELECT} WHERE key = ?"
# A damaged key may not be text any more.
_NEXT = f"SELECT CAST(key AS BLOB), {_ALL}, digest FROM captions WHERE key > CAST(? AS TEXT) ORDER BY key LIMIT 500"


def _upsert(*, take: str, first: str, second: str) -> str:
    """The statement that merges a new record (``excluded``) into the stored one (``captions``), if there is one.

    Args:
        take: Condition under which the new record's text is taken; scores belong to one text.
        first: The side whose fields come first.
        second: The side that fills the gaps.
    """

    def either(name: str) -> str:
        return f"COALESCE({first}.{name}, {second}.{name})"

    def taken(name: str) -> str:
        return f"CASE WHEN {take} THEN excluded.{name} ELSE captions.{name} END"

    def score(name: str, of_same_text: str) -> str:
        return f"CASE WHEN excluded.caption = captions.caption THEN {of_same_text} ELSE {taken(name)} END"

    def with_similarity(name: str) -> str:
        return f"CASE WHEN {either('similarity')} IS {first}.similarity THEN {first}.{name} ELSE {second}.{name} END"

    is_same_similarity = "COALESCE(excluded.similarity = captions.similarity, TRUE)"
    rank = f"CASE WHEN {is_same_similarity} THEN {either('rank')} ELSE {first}.rank END"
    return f"""
INSERT INTO captions ({_ALL}) VALUES ({", ".join("?" * len(COLUMNS))})
ON CONFLICT (key) DO UPDATE SET
    caption = {taken("caption")}, captioner = {taken("captioner")}, source = {taken("source")},
    label = {either("label")}, path = {either("path")}, words = {taken("words")},
    context = COALESCE(captions.context, excluded.context), contradiction = {taken("contradiction")},
    similarity = {score("similarity", either("similarity"))}, rank = {score("rank", rank)},
    scorer = {score("scorer", with_similarity("scorer"))}, prompt = {score("prompt", with_similarity("prompt"))}
"""


_PUT = _upsert(take="(excluded.source = 'human' OR captions.source <> 'human')", first="excluded", second="captions")
_MERGE = _upsert(take="(excluded.source = 'human' AND captions.source <> 'human')", first="captions", second="excluded")


@dataclass(frozen=True)
class CaptionsReport:
    """What `CaptionStore.verify` found.

    Args:
        checked: Records that could be read.
        damaged: Keys of those that do not fit their digest.
        broken: What is wrong with the file as a whole; None: nothing.
    """

    checked: int
    damaged: tuple[str, ...] = ()
    broken: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged and self.broken is None


class CaptionStore:
    """Captions by image key, in one SQLite file, for one writer at a time and any number of readers.

    The file is opened at first use, once for each process and thread, so the object survives forks and pickles as its path.
    A write-protected file, or one on read-only media, can still be read.

    Only other human captions replace those with ``source="human"``; similarities and ranks can always be updated.

    Args:
        path: Path of the file, which is created on first use unless ``readonly``.
        readonly: Refuse to write; the file must exist.

    Raises:
        StoreError: From every method, if the file cannot be read or written, is not a caption store, or has a newer version.

    Examples:
        >>> store = CaptionStore("own.sqlite")
        >>> store.put(CaptionRecord("0f" * 16, "a cat on a sofa", label="cat", source="human"))
        >>> store.get("0f" * 16).label
        'cat'
        >>> len(store), "ab" * 16 in store
        (1, False)
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        text = os.fspath(path)
        if not isinstance(text, str) or not text or "\0" in text:
            raise StoreError(f"caption store path {text!r} is empty, is bytes, or holds a NUL character; choose another one")
        self._database = Database(Path(text).expanduser(), readonly=readonly)
        self._damaged_seen = 0

    @property
    def path(self) -> Path:
        """The store's file."""
        return self._database.path

    @property
    def readonly(self) -> bool:
        """Whether this object refuses to write."""
        return self._database.readonly

    def __getstate__(self) -> dict[str, object]:
        return {"path": os.fspath(self.path), "readonly": self.readonly}

    def __setstate__(self, state: dict[str, object]) -> None:
        CaptionStore.__init__(self, str(state["path"]), readonly=bool(state["readonly"]))

    def __repr__(self) -> str:
        return f"CaptionStore({os.fspath(self.path)!r}{', readonly=True' if self.readonly else ''})"

    def get(self, key: str) -> CaptionRecord | None:
        """The record of one image, or ``None``."""
        row = self._database.one(_GET, (check_key(key),))
        return None if row is None else from_row(row) or self._sound(row)

    def get_many(self, keys: Iterable[str]) -> dict[str, CaptionRecord]:
        """The records of those keys that have one."""
        checked = [check_key(key) for key in keys]
        found: dict[str, CaptionRecord] = {}
        with self._database.reading() as connection:
            for where, parameters in in_chunks(checked):
                rows = connection.execute(f"{_SELECT} WHERE {where}", parameters)
                found.update((row[0], record) for row in rows if (record := self._sound(row)) is not None)
        return found

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that have no record, deduplicated and in their order."""
        wanted = list(dict.fromkeys(keys))
        known = self.get_many(wanted)
        return [key for key in wanted if key not in known]

    def put(self, record: CaptionRecord) -> None:
        """Store one record; see `put_many`."""
        self.put_many((record,))

    def put_many(self, records: Iterable[CaptionRecord]) -> None:
        """Store records in one transaction: all of them, or none if there is an error.

        A record replaces an older one with the same key, but only a human caption replaces a human one. A label or path that
        the new record lacks is kept. An existing context is always kept; see `set_contexts`. Similarity and rank belong to a
        text, so they are kept only if the caption stays the same.

        Raises:
            StoreError: A record cannot be stored, or the file cannot be written.
        """
        rows = [to_row(record) for record in records]
        if rows:
            with self._database.writing([str(row[0]) for row in rows]) as connection:
                connection.executemany(_PUT, rows)

    def set_similarities(self, similarities: Mapping[str, float | None]) -> None:
        """Set the similarity of some records, including human ones; their ranks are unknown until `set_ranks`.

        Args:
            similarities: Key -> cosine of (image, prompt). Keys without a record are left out.
        """
        rows = [(to_row(CaptionRecord(key, "", similarity=value))[3], key) for key, value in similarities.items()]
        with self._database.writing(list(similarities)) as connection:
            connection.executemany("UPDATE captions SET similarity = ?, rank = NULL WHERE key = ?", rows)

    def set_ranks(self, *, keep: bool = False) -> int:
        """Rank the similarities of the whole store in [0, 1], with ties; returns how many ranks were set.

        Similarities of different scorers are not comparable, so each scorer's are ranked separately. Records without a
        similarity get no rank.

        Args:
            keep: Keep existing ranks, and place the new ones among them. A variant depends on its image's rank, so that
                must not change when images are added. If fewer than half of the similarities have a rank, all are ranked
                again.
        """
        with self._database.writing(None) as connection:
            connection.execute("UPDATE captions SET rank = NULL WHERE similarity IS NULL AND rank IS NOT NULL")
            rows = connection.execute(
                "SELECT scorer, key, similarity, rank FROM captions WHERE similarity IS NOT NULL"
            ).fetchall()
            ranks: list[tuple[float | None, str]] = []
            for scorer in {row[0] for row in rows}:
                ranks += _ranked([row[1:] for row in rows if row[0] == scorer], keep=keep)
            connection.executemany("UPDATE captions SET rank = ? WHERE key = ?", ranks)
        return len(ranks)

    def lacks_ranks(self) -> bool:
        """Whether there are similarities without a rank, which `set_ranks` would rank."""
        query = "SELECT EXISTS (SELECT 1 FROM captions WHERE similarity IS NOT NULL AND rank IS NULL)"
        return bool(self._database.one(query, ())[0])

    def contexts(self) -> list[tuple[str, str | None, str]]:
        """Key, label and context of each record that has a context to lend."""
        query = "SELECT key, label, context FROM captions WHERE context IS NOT NULL ORDER BY key"
        with self._database.reading() as connection:
            return connection.execute(query).fetchall()

    def set_contexts(self, contexts: Mapping[str, str]) -> None:
        """Set which records lend their contexts; replaces the earlier set.

        Which context a variant borrows depends on this set. So it changes only here, and not when records are added or
        captions change.

        Args:
            contexts: Key -> context. Keys without a record are left out.
        """
        rows = [(to_row(CaptionRecord(key, "", context=value))[10], key) for key, value in contexts.items()]
        with self._database.writing(None) as connection:
            connection.execute("UPDATE captions SET context = NULL WHERE context IS NOT NULL")
            connection.executemany("UPDATE captions SET context = ? WHERE key = ?", rows)

    def set_context(self, key: str, context: str) -> bool:
        """Change what one record lends, if it lends anything; variants that borrow it get new addresses.

        Returns:
            Whether the record lends its context.
        """
        row = (to_row(CaptionRecord(key, "", context=context))[10], key)
        with self._database.writing([key]) as connection:
            return bool(
                connection.execute("UPDATE captions SET context = ? WHERE key = ? AND context IS NOT NULL", row).rowcount
            )

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the records of ``keys``, including human ones, so that their images are captioned again."""
        rows = [(check_key(key),) for key in keys]
        with self._database.writing(()) as connection:
            connection.executemany("DELETE FROM captions WHERE key = ?", rows)

    def __iter__(self) -> Iterator[CaptionRecord]:
        """All records, ordered by key. The store may be written meanwhile: each record is read when its turn comes."""
        last = b""
        while True:
            with self._database.reading() as connection:
                page = connection.execute(_NEXT, (last,)).fetchall()
            if not page or page[-1][0] <= last:  # the second only in a damaged file
                return
            last = page[-1][0]
            yield from (record for row in page if (record := self._sound(row[1:])) is not None)

    def __len__(self) -> int:
        with self._database.reading() as connection:
            return int(connection.execute("SELECT count(*) FROM captions").fetchone()[0])

    def __bool__(self) -> bool:  # an empty store is still a store
        return True

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def merge(self, other: "CaptionStore | str | os.PathLike[str]") -> None:
        """Add what another store knows and this one does not, in one transaction.

        For an image in both stores, this store's caption stays unless only the other one is human. A missing label, path,
        similarity or rank is filled in; scores only for the same caption. Ranks of two stores are not comparable: call
        `set_ranks` afterwards.
        """
        source = CaptionStore(other.path if isinstance(other, CaptionStore) else other, readonly=True)
        try:
            with self._database.writing(None) as connection:
                connection.executemany(_MERGE, map(to_row, source))
        finally:
            source.close()

    def export_metadata_jsonl(self, path: str | os.PathLike[str]) -> int:
        """Write a ``metadata.jsonl`` as Hugging Face's ImageFolder reads it: ``file_name``, ``text`` and our fields.

        ``file_name`` is relative to the folder of ``path`` for images below it. Records without an image path are left out,
        because the format has no place for them.

        Returns:
            How many records were written.

        Raises:
            StoreError: The file cannot be written; an existing file is left unchanged.
        """
        return exchange.write_jsonl(self, Path(path))

    def import_metadata_jsonl(self, path: str | os.PathLike[str], *, key: Callable[[Path], str] | None = None) -> int:
        """Read a ``metadata.jsonl``: all of it, or nothing if there is an error.

        Args:
            path: Path of the file; images are looked for in its folder.
            key: Image file -> key, for lines without a ``key`` field; the default reads the image (``image_key``).

        Returns:
            How many records were read. Only human ones replace human captions in the store.

        Raises:
            StoreError: A line is not a valid record; the message gives its number.
        """
        records = exchange.read_jsonl(Path(path), key)
        self.put_many(records)
        return len(records)

    def export_parquet(self, path: str | os.PathLike[str]) -> int:
        """Write all records to a Parquet file, one column per field; returns how many. Needs the ``parquet`` extra."""
        return exchange.write_parquet(self, Path(path))

    def import_parquet(self, path: str | os.PathLike[str]) -> int:
        """Read what `export_parquet` wrote, or any Parquet file with the columns ``key`` and ``caption``.

        Returns:
            How many records were read. Only human ones replace human captions in the store.
        """
        records = exchange.read_parquet(Path(path))
        self.put_many(records)
        return len(records)

    @property
    def damaged_seen(self) -> int:
        """How many damaged records this object has found. Each counts as missing: the image is captioned again."""
        return self._damaged_seen

    def verify(self, *, repair: bool = False) -> CaptionsReport:
        """Read the whole file and compare each record with its digest.

        Args:
            repair: Move damaged records to the table ``damaged`` of the file. If the file itself is damaged, a new one with
                everything readable replaces it, and the old one is kept beside it as ``NAME.damaged``; nothing else may use
                the store meanwhile.

        Raises:
            StoreError: There is no such file, or it cannot be read or repaired.
        """
        broken = self._database.problem()
        if broken:
            rows = self._database.readable()
        else:
            with self._database.reading() as connection:
                rows = {str(row[0]): row for row in connection.execute(_SELECT)}
        damaged = tuple(key for key, row in rows.items() if from_row(row) is None)
        if repair and broken:
            self._rebuild([record for row in rows.values() if (record := from_row(row)) is not None])
        elif repair and damaged:
            with self._database.writing(None):
                pass
        return CaptionsReport(len(rows), damaged, broken)

    def close(self) -> None:
        """Close this process's connections; the next use opens the file again."""
        self._database.close()

    def _sound(self, row: tuple[Any, ...]) -> CaptionRecord | None:
        record = from_row(row)
        if record is None:
            if not self._damaged_seen:
                _log.warning(
                    "the record of image %s in %s is damaged and counts as missing (further ones are not logged)",
                    row[0], self.path,
                )  # fmt: skip
            self._damaged_seen += 1
        return record

    def _rebuild(self, records: Sequence[CaptionRecord]) -> None:
        """Replace a damaged file by a new one with ``records`` and keep the old one. A file is in place at any moment."""
        new, old = CaptionStore(f"{self.path}.repaired"), Path(f"{self.path}.damaged")
        if old.exists():
            raise StoreError(f"{old} is there from an earlier repair; move it away first")
        try:
            new.path.unlink(missing_ok=True)
            len(new)  # creates the file even without records
            new.put_many(records)
            new.close()
            self.close()
            for end in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self.path}{end}", f"{old}{end}")
            os.link(self.path, old)
            os.replace(new.path, self.path)
        except OSError as error:
            raise StoreError(f"{self.path} could not be replaced by {new.path}: {error.strerror or error}") from error


def _ranked(rows: Sequence[tuple[str, float, float | None]], *, keep: bool) -> list[tuple[float | None, str]]:
    """(rank, key) pairs to set, from rows of (key, similarity, rank)."""
    known = sorted((similarity, rank) for _, similarity, rank in rows if rank is not None)
    if not keep or 2 * len(known) < len(rows):
        ranks = rank_similarities([similarity for _, similarity, _ in rows])
        return list(zip(ranks, (key for key, _, _ in rows), strict=True))
    similarities, places = zip(*known, strict=True) if known else ((), ())
    new = [(key, similarity) for key, similarity, rank in rows if rank is None]
    return [(float(np.interp(similarity, similarities, places)), key) for key, similarity in new]
