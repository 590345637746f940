"""VariantStore: writers killed at random moments."""

import os
import subprocess
import sys
from pathlib import Path


def test_killed_writers_lose_nothing_and_leave_nothing(tmp_path):
    """200 SIGKILLs, 4 writers, 2 readers: no wrong read, no completed put lost, no temporary file left after a sweep."""
    script = Path(__file__).with_name("kill_variant_writers.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "variants"), "200"],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = dict(item.split("=") for item in done.stdout.split())
    assert int(result.pop("completed")) > 200
    assert int(result.pop("hits")) > 100
    assert result == {
        "kills": "200",
        "lost": "0",
        "readers": "2",
        "wrong": "0",
        "damaged": "0",
        "quarantined": "0",
        "swept": "True",
        "temporary": "0",
    }
