"""Whether captions agree with their labels, and which of them lend their contexts to other images."""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sgid_transforms.captions.record import CaptionRecord

LENDERS = 2000
"""How many images of a data set lend their contexts, but at least 100 of each class. Processes keep them in memory."""

_WORD = re.compile(r"\w+")


class ClassWords:
    """Finds the classes that a text names.

    Args:
        classes: Names of the classes, in words.
        synonyms: Further names, mapped to their class; class numbers are ignored.
    """

    def __init__(self, classes: Iterable[str], synonyms: Mapping[Any, str] | None = None) -> None:
        named = {name: name for name in classes}
        given = {str(name).replace("_", " "): words for name, words in (synonyms or {}).items() if not str(name).isdecimal()}
        self._classes = {_spelt(name): words for name, words in (given | named).items() if _spelt(name)}
        # Longest first, so that "sea lion" does not count as a lion.
        names = sorted(self._classes, key=len, reverse=True)
        either = "|".join(r"\W+".join(map(re.escape, name.split(" "))) for name in names)
        self._pattern = re.compile(rf"(?<!\w)({either})(?:s|es)?(?!\w)", re.IGNORECASE) if names else None

    def named(self, text: str) -> set[str]:
        """The classes that ``text`` names, in any case, singular or plural."""
        found = self._pattern.finditer(text) if self._pattern else ()
        return {self._classes[_spelt(match[1])] for match in found}

    def contradict(self, record: CaptionRecord) -> bool:
        """Whether a record's caption names another class but not its own."""
        named = self.named(record.caption) if record.label else set()
        return bool(named) and record.label not in named


def checked(records: Iterable[CaptionRecord], words: ClassWords) -> Iterator[CaptionRecord]:
    """The records whose ``contradiction`` must change, corrected; the scorer's verdict is kept."""
    for record in records:
        said = ["words"] if words.contradict(record) else []
        if "scorer" in (record.contradiction or ""):
            said.append("scorer")
        if record.contradiction != (wanted := ", ".join(said) or None):
            yield replace(record, contradiction=wanted)


def lenders(records: Iterable[CaptionRecord], context: Callable[[CaptionRecord], str]) -> dict[str, str]:
    """Key -> context of the images that lend theirs: all of a small data set, or an even share of each class of a large one.

    A context may be empty, like that of "a dog": a variant that borrows it is made from its label alone.
    """
    by_class: dict[str | None, list[tuple[bytes, str, str]]] = {}
    for record in records:
        chosen = by_class.setdefault(record.label, [])
        entry = (place(record.key), record.key, context(record))
        (heapq.heappush if len(chosen) < LENDERS else heapq.heappushpop)(chosen, entry)  # drops the smallest
    share = max(LENDERS // max(len(by_class), 1), 100)
    return {key: said for chosen in by_class.values() for _, key, said in heapq.nlargest(share, chosen)}


def place(key: str) -> bytes:
    """A record's place in the order of lenders: 8 bytes, evenly spread for any kind of keys."""
    return hashlib.sha256(key.encode()).digest()[:8]


def _spelt(name: str) -> str:
    return " ".join(_WORD.findall(name.lower()))
