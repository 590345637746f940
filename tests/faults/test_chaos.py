"""A short, deterministic cut of ``make chaos``, each attack in a process of its own, because it forks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import chaos


@pytest.mark.parametrize("name", chaos.ATTACKS)
def test_nothing_that_is_guaranteed_breaks(name):
    scale = chaos.ATTACKS[name].short / chaos.ATTACKS[name].amount
    done = subprocess.run(
        [sys.executable, chaos.__file__, "--only", name, "--scale", str(scale)],
        capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"| {name} | " in done.stdout


def test_the_full_cut_is_as_large_as_the_guarantees_say():
    text = Path(chaos.TESTS.parent, "docs", "guarantees.md").read_text()
    for name, attack in chaos.ATTACKS.items():
        if name != "forks under load":
            assert f"| {name} | {attack.amount:,} |" in text
