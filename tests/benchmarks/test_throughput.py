"""The throughput benchmark: all that it reports, from one small run; how fast this machine is, is not tested."""

import json
import time
from functools import partial

import instruments
import pytest
import random_models
import throughput
import torch

from pretended import PretendedDevice
from sgid_transforms.generation.engine import NativeEngine


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("throughput")
    settings = "--device cpu --images 3 --single 1 --batch-size 2 --steps 2 4 --rounds 1 --attention sdpa --threads 1"
    throughput.main([*settings.split(), "--out", str(out)])
    return out, json.loads((out / "throughput.json").read_text())


def test_every_stage_has_a_rate_and_together_they_take_no_longer_than_the_whole(report):
    rows = report[1]["rows"]
    assert [(row["steps"], row["batch_size"], row["model"]) for row in rows] == [(2, 2, "tiny"), (4, 2, "tiny")]
    for row in rows:
        assert all(row[name] > 0 for name in (*throughput.STAGES, *throughput.WHOLE, "peak MiB"))
        networks = sum(1 / row[stage] for stage in ("text", "encode", "denoise", "decode"))
        assert networks <= 1 / row["generate"] * 1.01  # rates are rounded
        parts = sum(1 / row[stage] for stage in ("caption", "generate", "filter", "store"))
        assert parts <= 1 / row["end to end"] * 1.01
        assert 0 < row["of limit"] == pytest.approx(row["generate"] * row["TFLOP per image"] / row["peak TFLOP/s"], rel=0.05)
        assert row["fill"] == 3 / 4  # all three in one call, since tiny takes guidance as an input
        assert (row["copies there"], row["copies back"], row["idle"]) == (0, 0, None)
    assert report[1]["machine"]["device"] == "CPU, 1 threads"
    assert report[1]["settings"]["strength"] == 0.5


def test_the_figures_are_a_table_and_a_plot_too(report):
    text = (report[0] / "throughput.md").read_text()
    about, rates, why = text.rsplit("\n\n", 2)
    assert about.startswith("Medians of 1 rounds of 3 images, strength 0.5\n- device: CPU, 1 threads\n")
    for part in (rates, why):
        lines = part.splitlines()
        assert lines[2].startswith("| tiny float32 sdpa, 2 steps, batch 2 | ")
        assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert (report[0] / "throughput.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["cuda", "npu"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the real device would take the place of the pretended one")
def test_it_runs_whole_on_an_accelerator(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", partial(instruments.peak_flops, side=64))  # the product runs on the CPU
    settings = "--model tiny --dtype float32 --images 4 --single 1 --batch-size 2 --steps 2 --warmup 0 --rounds 1"
    with PretendedDevice(kind):
        throughput.main([*settings.split(), "--out", str(tmp_path)])
    report = json.loads((tmp_path / "throughput.json").read_text())
    (row,) = report["rows"]
    assert report["settings"]["device"] == f"{kind}:0" or report["settings"]["device"] == kind
    assert all(row[name] > 0 for name in (*throughput.STAGES, *throughput.WHOLE, "of limit", "fill", "copies there"))
    assert row["copies back"] > 0
    assert row["idle"] is None  # PyTorch's profiler sees no such device
    assert row["peak MiB"] == 1024
    assert report["machine"]["device"].startswith(f"pretended {kind}")


def test_attention_that_cannot_run_is_a_row_with_its_reason(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise throughput.GenerationError("there is no such kernel here")

    monkeypatch.setattr(throughput, "load", fails)
    throughput.main(["--attention", "xformers", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert row["skipped"] == "there is no such kernel here"
    assert "| skipped |" in (tmp_path / "throughput.md").read_text()


def test_a_preset_fills_in_what_is_not_given(monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "measure", lambda configurations, args: seen.append((configurations, args)) or [])
    monkeypatch.setattr(throughput, "default_device", lambda: "mps")
    monkeypatch.setattr(throughput, "machine", lambda device: {"device": device})
    throughput.main(["--batch-size", "4"])
    throughput.main(["--preset", "full"])
    throughput.main(["--device", "cpu"])
    (quick, args), (full, _), (cpu, _) = seen
    assert [(one.model, one.batch_size, one.steps, one.dtype) for one in quick] == [("sd-turbo", 4, 4, "bfloat16")]
    assert (args.device, args.images, args.image_size) == ("mps", 64, 512)
    assert {one.model for one in full} == set(random_models.NAMES)
    assert {one.compile for one in full} == {"off", "on", "reduce-overhead"}
    assert [(one.model, one.dtype, one.compile) for one in cpu] == [("tiny", "float32", "off")]


def test_warm_up_rounds_do_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    lengths = [50.0, 3.0, 1.0, 2.0]

    def run(number):
        clock[0] += lengths[number]

    assert throughput.median_rounds(run, instruments.Stopwatch("cpu"), warmup=1, rounds=3) == {"total": 2.0}


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
