"""The command line: ``sgid``. Each command imports what it needs only when it runs, so ``--help`` is fast."""

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
