"""Public names and their arguments are a promise: whoever changes one sees it here, and says so in the changelog."""

import inspect
from pathlib import Path
from typing import Any

import sgid_transforms

SNAPSHOT = Path(__file__).with_name("public_api.txt")


def _arguments(function: Any) -> str:
    """Names, kinds and defaults; annotations may become more exact."""
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in inspect.signature(function).parameters.values()]
    plain = [one.replace(default=...) if "0x" in str(one) else one for one in parameters]
    return str(inspect.Signature(plain))


def _public() -> list[str]:
    lines = []
    for name in sorted(set(sgid_transforms.__all__) - {"__version__"}):
        value = getattr(sgid_transforms, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"{name}({', '.join(base.__name__ for base in value.__bases__)})")
            continue
        lines.append(f"{name}{_arguments(value)}")
        if not inspect.isclass(value):
            continue
        for member, found in sorted(vars(value).items()):
            if member.startswith("_"):
                continue
            function = getattr(found, "__func__", found)
            if inspect.isfunction(function):
                lines.append(f"{name}.{member}{_arguments(function)}")
            elif isinstance(found, property):
                lines.append(f"{name}.{member}")
    return lines


def test_public_names_and_arguments_are_those_of_the_snapshot() -> None:
    now = "\n".join(_public()) + "\n"
    assert now == SNAPSHOT.read_text(), (
        "the public API changed: say so in CHANGELOG.md, then write the new lines to public_api.txt"
    )
