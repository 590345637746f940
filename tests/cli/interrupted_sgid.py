"""Runs the command line in a process that can be interrupted, with fake models that tell what they do."""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from job_fakes import FakeCaptioner, FakeGenerator, fake_models


def run(arguments: list[str], folder: Path, events: Connection) -> None:
    """``sgid`` with these arguments in that folder; each step of the models is sent to `events`."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from sgid_transforms.cli import main, options

    def tell(event: str) -> None:
        events.send(event)
        events.recv()  # go on when the test has seen it: it decides how far a run gets

    models = fake_models(FakeGenerator(tell), FakeCaptioner(tell), batch_size=2)
    options.models_from = lambda *arguments: models  # type: ignore[assignment]
    sys.argv = ["sgid", *arguments]
    main()
