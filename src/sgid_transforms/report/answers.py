"""Answers of people in a study of variants, in one SQLite file beside the caption store."""

import contextlib
import csv
import io
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from sgid_transforms.errors import StoreError

QUESTIONS = ("class", "difference")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    trial TEXT NOT NULL, who TEXT NOT NULL, question TEXT NOT NULL, arm TEXT NOT NULL, key TEXT NOT NULL,
    label TEXT NOT NULL, answer TEXT NOT NULL, "when" REAL NOT NULL, PRIMARY KEY (trial, who)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Answer:
    """One person's answer to one question.

    Args:
        trial: Id of the question.
        who: Name of the person.
        question: ``"class"``: which class the picture shows; ``"difference"``: how different two pictures are.
        arm: Where the pictures came from: ``"originals"``, ``"randaugment"``, or a recipe's fingerprint.
        key: Key of the original.
        label: Its class.
        answer: A class name, or a number from 1 (the same) to 5 (nothing in common).
        when: Seconds since 1970.
    """

    trial: str
    who: str
    question: str
    arm: str
    key: str
    label: str
    answer: str
    when: float

    @property
    def is_right(self) -> bool:
        """Whether the person saw the label."""
        return self.answer == self.label


class Answers:
    """The answers of a study. An answer is on the disk when `add` returns; a later one of the same person replaces it.

    Args:
        path: The file; created by the first answer.

    Raises:
        StoreError: From every method, if the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def add(self, answer: Answer) -> None:
        """Keep an answer."""
        with self._open("write", create=True) as connection:
            connection.execute(_SCHEMA)
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", astuple(answer))

    def all(self) -> list[Answer]:
        """All answers, oldest first."""
        if not self.path.exists():
            return []
        with self._open("read") as connection:
            return [Answer(*row) for row in connection.execute('SELECT * FROM answers ORDER BY "when", trial, who')]

    @contextlib.contextmanager
    def _open(self, verb: str, create: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=30)
            try:
                connection.execute("PRAGMA synchronous=FULL")
                with connection:
                    yield connection
            finally:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"could not {verb} the answers in {self.path}: {error}; check the file and its folder") from error


def beside(captions: str | os.PathLike[str]) -> Path:
    """Where the answers of a caption store's images are kept."""
    path = Path(captions)
    return path.with_name(f"{path.stem}-study.sqlite")


def to_csv(answers: Iterable[Answer]) -> str:
    """The answers as a table. Texts that a spreadsheet would take for a formula get a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(Answer)]
    writer.writerow([*names, "right"])
    for answer in answers:
        right = int(answer.is_right) if answer.question == "class" else ""
        writer.writerow([*(_plain(value) for value in astuple(answer)), right])
    return out.getvalue()


def _plain(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
