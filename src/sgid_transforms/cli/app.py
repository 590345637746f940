"""The application: its commands, and how errors leave it."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from sgid_transforms.cli import codes
from sgid_transforms.cli.caption import command as caption
from sgid_transforms.cli.demo import command as demo
from sgid_transforms.cli.doctor import command as doctor
from sgid_transforms.cli.export import command as export
from sgid_transforms.cli.generate import command as generate
from sgid_transforms.cli.output import fail
from sgid_transforms.cli.preview import command as preview
from sgid_transforms.cli.prune import command as prune
from sgid_transforms.cli.report import command as report
from sgid_transforms.cli.verify import command as verify
from sgid_transforms.errors import SGIDError

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
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "caption": caption,
    "generate": generate,
    "preview": preview,
    "report": report,
    "export": export,
    "verify": verify,
    "prune": prune,
    "doctor": doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sgid {metadata.version('sgid-transforms')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """The console script: what a user did wrong is told in a sentence, a bug keeps its traceback."""
    # What the libraries below have to say to each other; our own warnings, and a bug in our code, still show.
    warnings.filterwarnings("ignore", module=r"(huggingface_hub|diffusers|transformers|accelerate|torch)\b")
    logging.basicConfig(format="sgid: %(message)s", level=logging.WARNING, stream=sys.stderr)
    try:
        app(prog_name="sgid")
    except SGIDError as error:
        fail(str(error))
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(codes.ERROR)
    except OSError as error:
        if error.strerror is None:
            raise
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's, without importing it
            raise
        fail("there is not enough memory; lower --batch-size, or take a smaller model")
    sys.exit(0)
