"""Waiting for other processes."""

import logging
from pathlib import Path

import pytest

from sgid_transforms import files
from sgid_transforms.files import Waiting


def test_what_a_terminal_would_obey_is_escaped_in_every_message_of_the_package(caplog):
    logging.getLogger("sgid_transforms").warning("%s\nand %r", "a\x1b[31m\u202eb", Path("c\x07"))
    assert told(caplog) == ["a\\x1b[31m\\u202eb\nand PosixPath('c\\x07')"]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    return now


def told(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_long_quiet_is_told_once_until_something_happens(clock, caplog):
    waiting = Waiting("the others")
    assert waiting.check() == 30
    clock[0] += 29
    assert waiting.check() == 1
    assert not told(caplog)
    for _ in range(5):
        clock[0] += 20
        waiting.check()
    assert told(caplog) == ["waiting for the others: nothing has happened for 49 s"]
    waiting.progress()
    clock[0] += 31
    waiting.check()
    assert told(caplog)[1:] == ["waiting for the others: nothing has happened for 31 s"]


def test_progress_does_not_move_the_deadline(clock):
    waiting = Waiting("the others", timeout=10)
    clock[0] += 9
    waiting.progress()
    assert waiting.check() == 1
    clock[0] += 1
    with pytest.raises(TimeoutError, match="waited for the others for timeout=10 s"):
        waiting.check()


def test_what_is_due_next_is_never_in_the_past(clock):
    waiting = Waiting("the others", timeout=1000)
    for _ in range(100):
        assert waiting.check() > 0
        clock[0] += 9.9
