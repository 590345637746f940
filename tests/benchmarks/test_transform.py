"""The benchmark of the hit path runs and reports what it promises; how fast this machine is, is not tested."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "transform.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_transform", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_rows_tell_times_and_their_ratio(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rows = benchmark.main(["--sizes", "16", "40", "--rounds", "2", "--calls", "3", "--json"])
    assert [(row.picture, row.size) for row in rows] == [("photo", 16), ("photo", 40), ("noise", 16), ("noise", 40)]
    for row in rows:
        assert 0 < row.hit_us < 1e6
        assert 0 < row.randaugment_us < 1e6
        assert row.ratio > 0
        assert row.pickle_bytes <= 16 * 1024
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [vars(row) for row in rows]


def test_a_call_that_is_no_hit_is_no_result(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.VariantStore, "put", lambda *arguments: False)
    with pytest.raises(RuntimeError, match="only 0 of 6 calls were hits"):
        benchmark.compare(tmp_path, "noise", 8, rounds=1, calls=3)
