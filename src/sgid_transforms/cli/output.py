"""What commands print: results on stdout, everything about the work itself on stderr."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sgid_transforms.cli import codes

if TYPE_CHECKING:
    from sgid_transforms.images.folders import Skipped


def say(text: str = "") -> None:
    """A line of the result."""
    print(_printable(text, sys.stdout.encoding), flush=True)


def note(text: str) -> None:
    """A line about the work."""
    print(_printable(f"note: {text}", sys.stderr.encoding), file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """End with an error."""
    print(_printable(f"error: {text}", sys.stderr.encoding), file=sys.stderr, flush=True)
    sys.exit(codes.ERROR)


def say_json(value: Any) -> None:
    """A result for scripts: one JSON object."""
    print(json.dumps(plain(value), indent=2), flush=True)


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def bar(what: str, unit: str, quiet: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Wraps anything that is walked through in a progress bar, which shows when that takes longer than a second."""
    from tqdm import tqdm

    def wrap(items: Iterable[Any]) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(items, desc=what, unit=unit, disable=quiet, delay=1)
        return shown

    return wrap


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"{name:<{width}}  {text}")


def list_skipped(title: str, skipped: Sequence["Skipped"], base: Path | None = None) -> None:
    """Every file that was left out, with its reason."""
    from sgid_transforms.images.folders import show

    if skipped:
        say(f"{title}:")
    for one in skipped:
        path = one.path
        if base is not None and path.is_relative_to(base):
            path = path.relative_to(base)
        say(f"  {show(path)}: {one.reason}")


def duration(seconds: float) -> str:
    """``2 h 5 min``, ``3 min 10 s``, ``12 s``, ``4.2 s``, ``35 ms``."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    hours = whole // 3600
    return f"{hours} h {whole % 3600 // 60} min" if hours < 48 else f"{hours / 24:.1f} days"


def size(count: float) -> str:
    """``12.3 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _printable(text: str, encoding: str | None) -> str:
    """Whatever the terminal's encoding cannot show is escaped instead of raising."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
