"""The command line: ``sgid``. What a command imports waits until it runs, so that ``--help`` is quick."""

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The console script. Even while modules are imported, Ctrl-C ends it without a traceback."""
    try:
        from sgid_transforms.cli.app import run

        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)
