"""Flat TOML files with one level of tables: read with the standard library, written here, since it only reads."""

import contextlib
import json
import os
import socket
import threading
import tomllib
from collections.abc import Mapping
from typing import Any

from sgid_transforms.errors import RecipeError


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a TOML file; :class:`RecipeError` if there is none, or it is not TOML."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {name}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} is not valid TOML: {error}") from error


def write(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write ``settings`` so that a reader, or a crash, sees either the old file or the whole new one."""
    name = os.fspath(path)
    temporary = f"{name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(dumps(settings))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)
    except OSError as error:
        raise RecipeError(f"cannot write the recipe {name}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # there is none after a success
            os.unlink(temporary)


def dumps(settings: Mapping[str, Any]) -> str:
    """``settings`` as TOML. Keys must be bare; ``None`` is left out, since TOML has no such value."""
    lines = [
        f"{key} = {_value(value)}" for key, value in settings.items() if value is not None and not isinstance(value, Mapping)
    ]
    for key, value in settings.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", dumps(value).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for two: surrogate pairs (so no ASCII escapes) and DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML has no form for {value!r}")
