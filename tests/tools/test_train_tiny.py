"""The recipe of the bundled models: its pieces, and every stage run small from first to last."""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools" / "train_tiny"


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    """The stages import one another by bare names; those modules are forgotten again after each test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(TOOLS))
    yield
    for name in set(sys.modules) - before:
        if str(TOOLS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def picture(ground, thing):
    image = torch.tensor(ground, dtype=torch.uint8).view(3, 1, 1).repeat(1, 32, 32)
    image[:, 9:23, 9:23] = torch.tensor(thing, dtype=torch.uint8).view(3, 1, 1)
    return image


@pytest.mark.parametrize(
    ("ground", "thing", "expected"),
    [
        ((250, 250, 250), (200, 30, 35), ("red", "white", "bright")),
        ((35, 65, 35), (235, 215, 60), ("yellow", "green", None)),
        ((10, 10, 10), (70, 50, 35), ("brown", "black", "dark")),
        ((95, 145, 205), (130, 130, 130), ("gray", "blue", None)),
    ],
)
def test_words_name_the_colours_of_object_and_background(ground, thing, expected):
    from words import describe

    look = describe(picture(ground, thing)[None])[0]
    assert (look["object"][0], look["background"], look["light"]) == expected


def test_a_caption_reads_as_english():
    from words import caption, context

    look = {
        "object": ("brown", "green"),
        "background": "orange",
        "light": "dark",
        "halves": None,
        "distance": None,
        "side": None,
    }
    assert caption("elk", look) == "an elk, brown and green, on an orange background, dark"
    look |= {"halves": ("blue", "green"), "distance": "far away", "side": "left"}
    assert context(look) == "brown and green, on an orange background, blue above green below, dark, far away, on the left"
    assert context(look, mirrored=True).endswith("on the right")
    assert context(look, keep=lambda name: name == "light") == "dark"


@pytest.mark.parametrize(
    ("left", "top", "size", "expected"),
    [
        (2, 13, 5, ("far away", "left")),
        (25, 13, 5, ("far away", "right")),
        (5, 5, 22, ("close up", None)),
        (10, 10, 12, (None, None)),
    ],
)
def test_words_say_how_near_the_object_is_and_where(left, top, size, expected):
    from words import describe

    image = torch.full((3, 32, 32), 240, dtype=torch.uint8)
    image[:, top : top + size, left : left + size] = 20
    look = describe(image[None])[0]
    assert (look["distance"], look["side"]) == expected


def test_the_halves_of_a_background_are_told_where_they_differ():
    from words import describe

    image = picture((95, 145, 205), (130, 130, 130))
    assert describe(image[None])[0]["halves"] is None
    image[:, 16:] = torch.tensor((50, 130, 50), dtype=torch.uint8).view(3, 1, 1)
    assert describe(image[None])[0]["halves"] == ("blue", "green")


def test_words_of_places_become_one_token_each_and_old_ids_stay(tmp_path):
    from tokenizer import extend, load

    tokenizer = Path(*TOOLS.parts[:-2], "src", "sgid_transforms", "assets", "tiny", "pipeline", "tokenizer", "tokenizer.json")
    model = json.loads(tokenizer.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(one) if isinstance(one, list) else one for one in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    before = load(tmp_path).get_vocab()
    added = extend(tmp_path, ["above", "far", "left", "white"])
    after = load(tmp_path)
    assert before.items() <= after.get_vocab().items()
    assert len(after) == len(before) + added
    assert all(len(after.tokenize(word)) == 1 for word in ("above", "far", "left", "white"))
    assert extend(tmp_path, ["above", "far"]) == 0


def test_the_noise_schedule_is_stable_diffusions_and_ends_in_pure_noise():
    from diffusers import DDIMScheduler

    from unet import scheduler

    original = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1).alphas_cumprod
    alphas = scheduler().alphas_cumprod
    assert float(alphas[-1]) < 1e-6
    ratio = ((1 - original) / original).sqrt() / ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(ratio[5:400], torch.ones_like(ratio[5:400]), rtol=0.1, atol=0)  # the stretch is at the end


def test_the_learning_rate_can_be_prolonged_before_it_decays():
    from common import lr_factor

    assert lr_factor(0, 1000, 0.4) < 0.02
    assert lr_factor(500, 1000, 0.4) == 1.0
    assert lr_factor(800, 1000, 0.4) == 0.5
    assert lr_factor(800, 2000, 0.4) == 1.0
    assert lr_factor(999, 1000, 0.4) == pytest.approx(1 / 400)


def stage(module, work, steps):
    from common import Combined, Stage

    # As in the CLIP and captioner stages: Muon for matrices, AdamW for the rest.
    optimizer = Combined(torch.optim.Muon([module.weight], 1e-2), torch.optim.AdamW([module.bias], 1e-2))

    def loss(step, generator):
        x = torch.randn(8, 4, generator=generator)
        return (module(x) - x).pow(2).mean(), {}

    args = argparse.Namespace(work=work, steps=steps, decay=0.5, seed=3)
    Stage("toy", {"m": module}, loss, optimizer).run(args)


def test_a_resumed_stage_ends_where_an_uninterrupted_one_does(tmp_path):
    from common import averaged

    def fresh():
        torch.manual_seed(0)
        return nn.Linear(4, 4)

    stage(fresh(), tmp_path / "a", 120)

    import common

    # The same schedule, stopped half-way by an error in a step.
    class Halted(common.Stage):
        def run(self, args):
            inner = self.loss

            def loss(step, generator):
                if step == 60:
                    raise KeyboardInterrupt
                return inner(step, generator)

            self.loss = loss
            super().run(args)

    # A checkpoint is written every two minutes and at the end; here after every step.
    clock = iter(range(0, 10**9, 1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.time, "monotonic", lambda: next(clock))
        patch.setattr(common, "Stage", Halted)
        with pytest.raises(KeyboardInterrupt):
            stage(fresh(), tmp_path / "b", 120)
    assert torch.load(tmp_path / "b" / "toy.pt", weights_only=True)["step"] == 60
    torch.manual_seed(99)
    stage(nn.Linear(4, 4), tmp_path / "b", 120)
    for key, value in averaged(tmp_path / "a", "toy")["m"].items():
        torch.testing.assert_close(averaged(tmp_path / "b", "toy")["m"][key], value, rtol=0, atol=0)


def test_logs_become_one_picture_in_which_a_repeated_step_counts_once(tmp_path, monkeypatch):
    import plot

    monkeypatch.setattr(sys, "argv", ["plot.py", "--work", str(tmp_path), "--out", str(tmp_path / "out.png")])
    with pytest.raises(SystemExit, match="no training log"):
        plot.main()
    rows = [{"step": 100, "loss": 2.0}, {"step": 200, "loss": 1.5}, {"step": 200, "loss": 1.0, "zero_shot": 0.5}]
    (tmp_path / "clip.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [row["loss"] for row in plot.rows_of(tmp_path / "clip.jsonl")] == [2.0, 1.0]
    plot.main()
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.width > 300


def test_a_stage_without_its_predecessor_says_which_one_to_run(tmp_path):
    from common import averaged

    with pytest.raises(FileNotFoundError, match="run the vae stage first"):
        averaged(tmp_path, "vae")


def test_heads_of_the_vision_tower_start_as_shifts_by_one_patch():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    import clip

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=clip.WIDTH,
        intermediate_size=3 * clip.WIDTH,
        num_hidden_layers=clip.LAYERS,
        num_attention_heads=clip.HEADS,
        image_size=32,
        patch_size=4,
    )
    vision = CLIPVisionModel(config).eval()
    vision = getattr(vision, "vision_model", vision)
    clip.init_as_convolution(vision, torch.Generator().manual_seed(0))
    pixels = clip.normalize(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        x = vision.pre_layrnorm(vision.embeddings(pixels))
        layer = vision.encoder.layers[0]
        x = layer.layer_norm1(x)
        shape = (2, 65, clip.HEADS, clip.WIDTH // clip.HEADS)
        q = layer.self_attn.q_proj(x).view(shape).transpose(1, 2)
        k = layer.self_attn.k_proj(x).view(shape).transpose(1, 2)
        attention = (q @ k.transpose(-1, -2) / shape[-1] ** 0.5).softmax(-1)
    middle = 1 + 3 * clip.GRID + 3
    for head in range(clip.HEADS):
        row = attention[0, head, middle, 1:]
        y, x_ = divmod(row.argmax().item(), clip.GRID)
        assert abs(y - 3) <= 1
        assert abs(x_ - 3) <= 1
        assert row.max() > 5 / 64


def parquet(path, count, seed):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "WEBP", lossless=True)
        name = names[i % 10]
        rows.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": f"{name}_s_{i:06}.png"},
                "label": i % 10,
                "label_name": name,
                "subname": f"small {name}" if i % 3 else name,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_every_stage_runs_and_the_bundle_it_makes_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    data, work, bundle = tmp_path / "data", tmp_path / "work", tmp_path / "bundle"
    data.mkdir()
    for split, count in (("pretrain", 120), ("test", 40), ("fewshot", 10)):
        parquet(data / f"{split}.parquet", count, len(split))

    def run(name, *arguments):
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()

    common = ("--data", data, "--work", work)
    run("tokenizer", *common)
    assert "tokens; captions: mean" in capsys.readouterr().out
    for name, extra in (
        ("vae", ()),
        ("classifier", ("--name", "judge")),
        ("unet", ("--wrong", "0.5")),
        ("clip", ()),
        ("captioner", ()),
        ("distil", ("--substeps", "2")),
    ):
        run(name, *common, "--steps", 2, "--batch-size", 10, *extra)
    teacher = tmp_path / "teacher.safetensors"
    run("export", "--work", work, "--out", bundle, "--judge", tmp_path / "judge.safetensors", "--teacher", teacher)
    run("evaluate", *common, "--bundle", bundle, "--limit", 10, "--search", 5)
    metrics = json.loads((bundle / "metrics.json").read_text())
    assert {"vae", "clip", "captioner", "label_0.3", "own_0.5", "travelling_1", "originals"} <= set(metrics)
    assert metrics["travelling_0.5"]["images"] == 10
    card = (bundle / "README.md").read_text()
    assert f"{metrics['vae']['psnr']:.2f} dB" in card
    assert "| **no** |" in card  # two steps of training reach nothing, and the card says so

    # Training goes on from the bundle alone: same vocabulary, same weights (but for fp16), and a next step.
    again = tmp_path / "again"
    run("resume_from_bundle", "--bundle", bundle, "--work", again, "--teacher", teacher)
    from common import averaged

    for name, module in (("vae", "vae"), ("unet", "unet"), ("distil", "unet"), ("clip", "clip"), ("captioner", "captioner")):
        old, new = averaged(work, name)[module], averaged(again, name)[module]
        assert old.keys() == new.keys()
        for key, value in old.items():
            kept = new[key][: len(value)] if "token_embedding" in key else new[key]
            torch.testing.assert_close(kept.to(value.dtype), value, rtol=1e-3, atol=1e-6)
    old, new = (json.loads((folder / "tokenizer" / "vocab.json").read_text()) for folder in (work, again))
    assert old.items() <= new.items()  # the words of places are made one token each
    captioner = "captioner_tokenizer/vocab.txt"
    assert (again / captioner).read_text().split() == (work / captioner).read_text().split()
    run("clip", "--data", data, "--work", again, "--steps", 1, "--batch-size", 10)
    assert torch.load(again / "clip.pt", weights_only=True)["step"] == 1


def test_the_students_steps_are_those_of_the_schedule():
    """What the student was taught is what the sampler asks it: four steps, at any strength."""
    from distil import STEPS, steps_of
    from sgid_transforms.generation.schedule import Schedule
    from unet import scheduler

    schedule = Schedule(scheduler().config, "ddim", STEPS, exact_strength=True)
    for strength in (0.3, 0.37, 0.5, 0.62, 0.9, 1.0):
        table = torch.tensor(schedule.trajectory(strength).table)
        taught = [steps_of(torch.tensor([strength]), torch.tensor([(at + 0.5) / len(table)])) for at in range(len(table))]
        assert [int(start) for start, _ in taught] == table[:, 0].int().tolist()
        assert [int(end) for _, end in taught] == [*table[1:, 0].int().tolist(), -1]
    assert table[-1, 3] == 1, "the last step leads to the clean picture"
