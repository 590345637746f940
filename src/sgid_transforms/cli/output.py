"""The output of commands: results on stdout, everything about the work itself on stderr, and an exit code."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sgid_transforms.files import show

if TYPE_CHECKING:
    from sgid_transforms.images.folders import Skipped

ERROR: Final = 1
"""Nothing could be done; the message says why. (A wrong command line gives 2.)"""

PARTIAL: Final = 3
"""Done, but something was left out or is damaged; the output lists it."""

INTERRUPTED: Final = 130
"""Stopped by Ctrl-C or SIGTERM; what was done is kept."""

_TINY_LABELS: Final = frozenset(("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"))
_TINY_SIZE: Final = 32


def say(text: str = "") -> None:
    """Print a line of the result."""
    print(printable(text, sys.stdout.encoding), flush=True)


def say_error(text: str) -> None:
    """Print a line that is not part of the result."""
    print(printable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def note(text: str | None) -> None:
    """Print a line about the work, if there is something to say."""
    if text:
        say_error(f"note: {text}")


def fail(text: str) -> NoReturn:
    """End with an error."""
    say_error(f"error: {text}")
    sys.exit(ERROR)


def printable(text: str, encoding: str | None) -> str:
    """Escape what a terminal would obey (control characters other than newlines) or could not encode.

    Everything that the command line prints goes through here, because names, labels and captions may hold anything.
    """
    encoding = encoding or "utf-8"
    return "\n".join(map(show, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)


def say_json(value: Any) -> None:
    """Print a result for scripts, one JSON object: dataclasses become objects, paths become strings."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else dataclasses.asdict(value)

    say(json.dumps(value, indent=2, default=plain).replace("\x7f", "\\u007f"))  # all other control characters are escaped


def bar(what: str, unit: str, quiet: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Wrap an iterable in a progress bar, which shows when the work takes longer than a second."""
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=what, unit=unit, disable=quiet, delay=1)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print two columns."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"{name:<{width}}  {text}")


def list_skipped(title: str, skipped: Sequence["Skipped"], base: Path) -> None:
    """Print every file that was left out, with its reason."""
    if skipped:
        say(f"{title}:")
    for one in skipped:
        path = one.path.relative_to(base) if one.path.is_relative_to(base) else one.path
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


def tiny_note(labels: Iterable[str], sizes: Iterable[tuple[int, int]]) -> str | None:
    """One sentence when the bundled ``tiny`` meets labels or sizes that it was not trained on, else None.

    Args:
        labels: Class names in words.
        sizes: ``(height, width)`` of the images.
    """
    strange = sorted({label for label in labels if label.lower() not in _TINY_LABELS})
    height, width = max(sizes, key=max, default=(0, 0))
    found = []
    if strange:
        found.append(f"{strange[0]!r}" + (f" and {len(strange) - 1} more" if len(strange) > 1 else ""))
    if max(height, width) > _TINY_SIZE:
        found.append(f"images of up to {width} x {height} pixels")
    if not found:
        return None
    return (
        f"the bundled model 'tiny' knows the ten classes of CIFAR-10 at {_TINY_SIZE} x {_TINY_SIZE} pixels, but your data has "
        f"{' and '.join(found)}: its variants show that the pipeline works, but will not help training; for real use, give "
        "--model stabilityai/sd-turbo (fast), stable-diffusion-v1-5/stable-diffusion-v1-5, or stabilityai/sdxl-turbo"
    )


def turned_note(count: int) -> str | None:
    """One sentence when EXIF orientations turned images, which torchvision's ``ImageFolder`` does not do, else None."""
    if not count:
        return None
    images = "1 image is" if count == 1 else f"{count} images are"
    return (
        f"{images} turned upright by the EXIF orientation, which torchvision's ImageFolder ignores: train with "
        "ImageFolder(DATA, loader=sgid_transforms.images.load_image), otherwise their variants are not found"
    )
