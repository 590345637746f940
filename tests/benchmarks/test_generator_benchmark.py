"""The benchmark of the generator: what it reports, from one small run; how fast this machine is, is not tested."""

import json
from typing import Any

import generator
import pytest


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("generator") / "figures.json"
    settings = "--images 4 --steps 5 --batch-size 2 --rounds 2 --pairs 2 --threads 1"
    assert generator.main([*settings.split(), "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["settings"]["threads"] == 1
    assert report["settings"]["elapsed_s"] > 0
    found: dict[str, Any] = report["figures"]
    return found


def test_all_ways_are_timed_in_every_round(figures: dict[str, Any]) -> None:
    assert {name: list(one["seconds"]) for name, one in figures.items()} == {"one": list("abcd"), "each": list("acd")}
    for one in figures.values():
        for name, seconds in one["seconds"].items():
            assert [len(times) for times in seconds] == ([2, 2] if name in "cd" else [1, 1])
            assert min(map(min, seconds)) > 0
        assert all(rate > 0 for rate in one["images_per_second"].values())
        for name, (low, high) in one["spread"].items():
            assert low <= one["ratios"][name] <= high


def test_the_engine_does_what_its_requests_need(figures: dict[str, Any]) -> None:
    """Four images of int(5 * 0.5) = 2 steps; four of strengths 0.2, 0.4, 0.6 and 0.8, that is 1, 2, 3 and 4 steps.

    `tiny` is told its guidance scale, so that guidance takes no second row.
    """
    assert (figures["one"]["images"], figures["one"]["rows"], figures["one"]["rows_needed"]) == (4, 8, 8)
    assert (figures["each"]["images"], figures["each"]["rows"], figures["each"]["rows_needed"]) == (4, 10, 10)
    assert (figures["one"]["calls"], figures["one"]["fill"]) == (2, 1.0)
    assert figures["each"]["calls"] * 4 >= 10


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that becomes half as fast changes no ratio."""
    summary = generator.summarize({"a": [[3.0], [6.0]], "c": [[1.0, 1.0], [2.0, 2.0]], "d": [[0.9, 0.9], [1.8, 1.8]]}, 10)
    assert summary["ratios"] == {"c/a": 3.0, "c/d": 0.9}
    assert summary["spread"] == {"c/a": [3.0, 3.0], "c/d": [0.9, 0.9]}
    assert summary["images_per_second"]["c"] == 10 / 1.5
    assert generator.missed({"each": summary}) == ["each: c/d is 0.900, promised are 0.97"]
    assert generator.missed({}) == []
    fewer = generator.summarize({"a": [[1.5]], "c": [[1.0]]}, 10, {"a": 5})
    assert (fewer["ratios"], fewer["images_per_second"]["a"]) == ({"c/a": 3.0}, 10 / 3)
