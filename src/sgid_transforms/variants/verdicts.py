"""What people said about variants: one log beside them, with a line for every verdict, so that none overwrites another."""

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from sgid_transforms.errors import StoreError
from sgid_transforms.variants import layout

try:
    import fcntl
except ImportError:  # pragma: no cover (not a POSIX system: one process at a time)
    fcntl = None  # type: ignore[assignment]

Decision = Literal["reject", "keep", "none"]
DECISIONS: Final = ("reject", "keep", "none")
MAX_TEXT = 1000
"""Characters of a name or a reason; longer ones are cut."""

FILE = "sgid-verdicts.jsonl"

_log = logging.getLogger("sgid_transforms.variants")

Rejections = Mapping[str, frozenset[tuple[str, int]]]
"""Rejected variants as (key, number), by the part of the key that names the image."""


@dataclass(frozen=True)
class Verdict:
    """What one person said about one variant.

    Args:
        recipe: Fingerprint of the variant's recipe.
        key: Key of the variant in its store.
        variant: Its number.
        decision: ``"reject"``: it must not be trained on; ``"keep"``: it is good; ``"none"`` takes back what the person said
            before.
        who: Name of the person.
        when: Seconds since 1970.
        why: The reason, in the person's words.

    Raises:
        StoreError: A name that no store can hold, an unknown decision, or nobody who said it.

    Examples:
        >>> Verdict("01ab", "0f" * 24, 2, "reject", who="anna", why="not a cat").decision
        'reject'
    """

    recipe: str
    key: str
    variant: int
    decision: Decision
    who: str
    when: float = 0.0
    why: str = ""

    def __post_init__(self) -> None:
        layout.check_fingerprint(self.recipe)
        layout.stem(self.key, self.variant)
        if self.decision not in DECISIONS:
            raise StoreError(f"the decision {self.decision!r:.80} is unknown; use one of {', '.join(DECISIONS)}")
        if not isinstance(self.who, str) or not self.who.strip():
            raise StoreError("a verdict needs the name of the person who gives it; pass who=")
        if isinstance(self.when, bool) or not isinstance(self.when, int | float) or not 0 <= self.when < 1e12:
            raise StoreError(f"when is {self.when!r:.80}; pass seconds since 1970, such as time.time()")
        if not isinstance(self.why, str):
            raise StoreError(f"why is {self.why!r:.80}; pass a text")
        object.__setattr__(self, "who", self.who.strip()[:MAX_TEXT])
        object.__setattr__(self, "why", self.why[:MAX_TEXT])

    @property
    def name(self) -> tuple[str, str, int]:
        """Recipe, key and number of the variant."""
        return self.recipe, self.key, self.variant

    def line(self) -> bytes:
        """The verdict as a line of the log, with a check sum."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f'{text[:-1]}, "check": "{_check(text)}"}}\n'.encode("ascii")

    @classmethod
    def from_line(cls, line: bytes) -> "Verdict | None":
        """The verdict of a line, or ``None`` if it is damaged."""
        try:
            values: Any = json.loads(line)
            check = values.pop("check")
            if check != _check(json.dumps(values, sort_keys=True)):
                return None
            return cls(**values)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, StoreError):
            return None


@dataclass(frozen=True)
class _Snapshot:
    """What a file held when it was last read; replaced as a whole, since threads of a server share it."""

    state: tuple[int, ...] | None = None
    verdicts: tuple[Verdict, ...] = ()
    standing: Mapping[tuple[str, str, int], Verdict] = field(default_factory=dict)
    damaged: int = 0
    rejections: dict[str, Rejections] = field(default_factory=dict)


class VerdictLog:
    """The verdicts of one store.

    Any number of processes may append at the same time. A line is on the disk before `append` returns, and what a killed
    process left unfinished is cut off by the next one.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._now = _Snapshot()
        self._warned = False

    def append(self, verdicts: Iterable[Verdict]) -> None:
        """Add verdicts.

        Raises:
            OSError: The file cannot be written; the verdicts are then not in it.
        """
        data = b"".join(verdict.line() for verdict in verdicts)
        if not data:
            return
        is_new = not os.path.exists(self._path)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
            end = _end_of_lines(descriptor)
            try:
                os.ftruncate(descriptor, end)
                os.lseek(descriptor, end, os.SEEK_SET)
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if is_new and os.name != "nt":
            folder = os.open(os.path.dirname(self._path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def read(self) -> tuple[Verdict, ...]:
        """All verdicts, in the order in which they were given; the file is only read again when it has changed.

        Damaged lines are left out, and logged once.
        """
        return self._read().verdicts

    def standing(self) -> Mapping[tuple[str, str, int], Verdict]:
        """The verdict that counts for each judged variant: the newest one, after everybody's own earlier ones are dropped.

        A person who takes back a verdict leaves those of the others in force.
        """
        return self._read().standing

    def damaged(self) -> int:
        """How many lines of the file are damaged."""
        return self._read().damaged

    def rejections(self, fingerprint: str) -> Rejections:
        """The rejected variants of a recipe."""
        now = self._read()
        known = now.rejections.get(fingerprint)
        if known is None:
            found: dict[str, set[tuple[str, int]]] = {}
            for (recipe, key, number), verdict in now.standing.items():
                if recipe == fingerprint and verdict.decision == "reject":
                    found.setdefault(layout.image_key_of(key), set()).add((key, number))
            known = now.rejections[fingerprint] = {image: frozenset(names) for image, names in found.items()}
        return known

    def _read(self) -> "_Snapshot":
        try:
            status = os.stat(self._path)
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if state == self._now.state:
                return self._now
            with open(self._path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            self._now = _Snapshot()
            return self._now
        except OSError as error:
            self._warn(f"{self._path} cannot be read ({error.strerror}); its verdicts do not count")
            return self._now
        found = [Verdict.from_line(line) for line in lines[:-1]]  # the last one is empty, or not yet complete
        verdicts = tuple(one for one in found if one is not None)
        if damaged := len(found) - len(verdicts):
            self._warn(f"{damaged} of {len(found)} verdicts in {self._path} are damaged and do not count")
        self._now = _Snapshot(state, verdicts, _standing(verdicts), damaged)
        return self._now

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s", message)


def _standing(verdicts: Iterable[Verdict]) -> dict[tuple[str, str, int], Verdict]:
    latest: dict[tuple[tuple[str, str, int], str], Verdict] = {}
    for verdict in sorted(verdicts, key=lambda one: one.when):  # stable: the order of the file decides between equal times
        latest[verdict.name, verdict.who] = verdict
    counting: dict[tuple[str, str, int], Verdict] = {}
    for verdict in sorted(latest.values(), key=lambda one: one.when):
        if verdict.decision != "none":
            counting[verdict.name] = verdict
    return counting


def _end_of_lines(descriptor: int) -> int:
    """Size of a file without the unfinished line at its end."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    end = size
    while end:
        start = max(end - 4096, 0)
        os.lseek(descriptor, start, os.SEEK_SET)
        place = os.read(descriptor, end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def _check(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
