"""The throughput benchmark: all that it reports, from one small run; how fast this machine is, is not tested."""

import json
import time

import pytest
import random_models
import throughput
import torch

from sgid_transforms.generation.engine import NativeEngine


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("throughput")
    settings = "--images 3 --single 1 --batch-size 2 --steps 2 4 --rounds 1 --attention sdpa --threads 1"
    throughput.main([*settings.split(), "--out", str(out)])
    return out, json.loads((out / "throughput.json").read_text())


def test_every_stage_has_a_rate_and_together_they_take_no_longer_than_the_whole(report):
    rows = report[1]["rows"]
    assert [(row["steps"], row["batch_size"], row["model"]) for row in rows] == [(2, 2, "tiny"), (4, 2, "tiny")]
    for row in rows:
        assert all(row[name] > 0 for name in (*throughput.STAGES, "end to end", "diffusers 1", "diffusers B", "peak MiB"))
        networks = sum(1 / row[stage] for stage in ("text", "encode", "denoise", "decode"))
        assert networks <= 1 / row["generate"] * 1.01  # rates are rounded
        parts = sum(1 / row[stage] for stage in ("caption", "generate", "filter", "store"))
        assert parts <= 1 / row["end to end"] * 1.01
    assert report[1]["machine"]["threads"] == 1
    assert report[1]["settings"]["strength"] == 0.5


def test_the_figures_are_a_table_and_a_plot_too(report):
    lines = (report[0] / "throughput.md").read_text().splitlines()
    assert lines[2].startswith("| tiny float32 sdpa, 2 steps, batch 2 | ")
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert (report[0] / "throughput.png").stat().st_size > 1000


def test_attention_that_cannot_run_is_a_row_with_its_reason(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise throughput.GenerationError("there is no such kernel here")

    monkeypatch.setattr(throughput, "load", fails)
    throughput.main(["--attention", "xformers", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert row["skipped"] == "there is no such kernel here"
    assert "| skipped |" in (tmp_path / "throughput.md").read_text()


def test_a_stopwatch_counts_each_call_to_its_stage(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))  # each look at the clock takes a second
    watch = throughput.Stopwatch("cpu")
    network = torch.nn.Identity()
    watch.watch("denoise", network)
    for _ in range(3):
        network(torch.zeros(1))
    with watch.counting_calls("store", throughput.VariantStore, "count"), watch.counting("filter"):
        assert throughput.VariantStore("nowhere").count() == 0
    assert watch.take() == {"denoise": 3.0, "store": 1.0, "filter": 3.0}
    assert watch.take() == {}
    assert throughput.VariantStore("nowhere").count() == 0
    assert watch.take() == {}


def test_warm_up_rounds_do_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    lengths = [50.0, 3.0, 1.0, 2.0]

    def run(number):
        clock[0] += lengths[number]

    assert throughput.median_rounds(run, throughput.Stopwatch("cpu"), warmup=1, rounds=3) == {"total": 2.0}


@pytest.mark.parametrize("name", random_models.NAMES)
def test_random_models_are_as_large_as_the_published_ones(name):
    parts = random_models.random_parts(name, torch.float16, "meta")
    assert {part: sum(w.numel() for w in model.parameters()) for part, model in parts.items()} == random_models.PARAMETERS[name]
    assert {w.dtype for model in parts.values() for w in model.parameters()} == {torch.float16}
    assert torch.get_default_dtype() == torch.float32


def test_a_random_pipeline_runs_natively():
    pipeline = random_models.random_pipeline("sdxl", torch.bfloat16, "meta")
    assert NativeEngine.supports(pipeline) is None
    assert pipeline.tokenizer.model_max_length == 77
    assert pipeline.text_encoder_2.config.eos_token_id == pipeline.tokenizer.eos_token_id


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="architecture 'sd9' is unknown"):
        random_models.random_parts("sd9")


def test_turbo_models_are_not_guided_unless_asked():
    assert throughput.guidance_of("stabilityai/sd-turbo", None) == 0.0
    assert throughput.guidance_of("tiny", None) == 3.0
    assert throughput.guidance_of("stabilityai/sd-turbo", 2.0) == 2.0
