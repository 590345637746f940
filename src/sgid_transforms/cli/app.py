"""The application: its commands, and how it reports errors. A command returns its exit code; None stands for 0."""

import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sgid_transforms.cli.demo import demo
from sgid_transforms.cli.doctor import doctor
from sgid_transforms.cli.generate import caption, generate
from sgid_transforms.cli.output import fail, printable, say, say_error
from sgid_transforms.cli.preview import preview
from sgid_transforms.cli.report import report
from sgid_transforms.cli.review import review
from sgid_transforms.cli.stores import export, pack, prune, verify
from sgid_transforms.cli.tune import tune
from sgid_transforms.errors import SGIDError

_UsageError: Final[Any] = typer.BadParameter.mro()[1]  # typer has no public name for it

app = typer.Typer(
    name="sgid",
    help="Label- and caption-guided variants of your images, for training classifiers.",
    epilog="Start with `sgid demo`. Exit codes: 0 all done, 1 error, 2 wrong command, 3 done with exceptions, 130 stopped.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _from_home(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with a leading ``~`` in its paths expanded: shells do not do so in ``--variants=~/variants``."""

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        return command(
            **{name: Path(os.path.expanduser(value)) if isinstance(value, Path) else value for name, value in given.items()}
        )

    return run


for _command in (demo, caption, generate, tune, preview, report, review, export, verify, prune, pack, doctor):
    app.command()(_from_home(_command))


def _say_version(asked: bool) -> None:
    if asked:
        say(f"sgid {metadata.version('sgid-transforms')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), sys.stderr.encoding)


def run() -> int:
    """Run the command line and return its exit code. Users' mistakes end in one sentence; a bug keeps its traceback."""
    # Hides what libraries warn each other about; our own warnings, and errors in our code, still show.
    warnings.filterwarnings("ignore", module=r"(huggingface_hub|diffusers|transformers|accelerate|torch)\b")
    log = logging.StreamHandler()
    log.setFormatter(_Formatter("sgid: %(message)s"))
    logging.basicConfig(handlers=[log], level=logging.WARNING)
    try:
        return app(prog_name="sgid", standalone_mode=False) or 0
    except _UsageError as error:
        text = io.StringIO()
        error.show(text)
        say_error(text.getvalue().rstrip())
        return int(error.exit_code)
    except SGIDError as error:
        fail(str(error))
    except OSError as error:
        if error.strerror is None:
            raise
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, without importing it
            raise
        fail("there is not enough memory; lower --batch-size, or use a smaller model")
