"""The command line: ``sgid``. One file per command; a command's imports wait until it runs, so that ``--help`` is quick."""

from sgid_transforms.cli.app import app, main

__all__ = ["app", "main"]
