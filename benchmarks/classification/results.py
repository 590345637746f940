"""Finished runs, one CSV row each, appended so that neither a killed process nor two at once can spoil the file."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Rows:
    """An append-only CSV file with a fixed header.

    Args:
        path: the file; made with the first row.
        fields: names of the columns; the first one names a row.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, tuple(fields)

    def read(self) -> list[dict[str, str]]:
        """All complete rows. What a killed writer left of a last line is not one.

        Raises:
            ValueError: the file has another header.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        text = data[: data.rfind(b"\n") + 1].decode()
        if not text:
            return []
        reader = csv.DictReader(io.StringIO(text))
        if tuple(reader.fieldnames or ()) != self.fields:
            raise ValueError(f"{self.path} has other columns than this version writes; choose another --out")
        return list(reader)

    def names(self) -> set[str]:
        """The first column."""
        return {row[self.fields[0]] for row in self.read()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row with one write, and wait until it is on the disk. One that is there by that name is not added again."""
        line = io.StringIO()
        csv.DictWriter(line, self.fields, lineterminator="\n").writerow(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):  # the rest of a line whose writer was killed
                file.truncate(whole)
            if str(row[self.fields[0]]) in self.names():
                return
            header = "" if whole else ",".join(self.fields) + "\n"
            file.write((header + line.getvalue()).encode())
            file.flush()
            os.fsync(file.fileno())


def digest(content: Mapping[str, Any]) -> str:
    """16 hex digits that stand for settings: equal settings, equal digits."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
