"""Exit codes, the same for all commands (2 is what a wrong command line gives)."""

from typing import Final

ERROR: Final = 1
"""Nothing could be done; the message says why."""

PARTIAL: Final = 3
"""Done, but something was left out or is not in order; the output lists it."""

INTERRUPTED: Final = 130
"""Stopped by Ctrl-C or SIGTERM; what was done is kept."""
