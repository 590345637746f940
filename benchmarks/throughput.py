"""Images per second of each stage of the way from an image to a stored variant, beside diffusers, in one run.

    python benchmarks/throughput.py                           # what this machine has, in some minutes; paste it into an issue
    python benchmarks/throughput.py --preset full --out FOLDER
    python benchmarks/throughput.py --model tiny --batch-size 1 8 32 --steps 4 10 --dtype float32 bfloat16
    python benchmarks/throughput.py --model stabilityai/sd-turbo --compile off on reduce-overhead --resolution 512 768
    python benchmarks/throughput.py --random-weights sdxl --dtype bfloat16 --attention sdpa xformers

A preset fills in what is not given: ``quick`` is SD-Turbo's architecture at two batch sizes, ``full`` all three architectures,
attentions and ways of compiling; on a CPU, both are `tiny`. All combinations of what is given more than once are measured.
``--random-weights`` builds a true architecture without any download, with a captioner and a CLIP as large as BLIP's and CLIP's
base models: pictures are noise, and the time is the same.

The stages are measured in place, in one and the same run of the real thing: hooks on the networks, on an accelerator by events,
on a CPU by the clock.

  caption    the captioner, tokens and all          denoise   UNet calls
  text       text encoder calls                     decode    VAE decoder calls
  encode     VAE encoder calls                      filter    CLIP's label check of finished images
  generate   requests to images, all included       store     file format, digest and disk
  end to end caption to stored file

Beside it, with the same model, strength and steps: ``diffusers 1``, its pipeline with one image per call, and ``diffusers B``,
with whole batches; they compare with ``generate``. The first rounds warm up; the figures are medians of the others. Further
rounds, which are not timed, say why it is as fast as it is:

  of limit   ``generate`` beside the speed at which the device multiplies matrices in this dtype, measured in the same run; what
             an image needs is what diffusers' own batched call computes, counted by `torch.utils.flop_counter`
  fill       share of the rows in the UNet's batches that requests had use for
  copies     from CPU to device and back, for each image
  idle       share of the time in which the device ran nothing, by PyTorch's profiler, where that knows the device
  peak MiB   the device's memory; on a CPU the process's
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from instruments import Copies, Stopwatch, device_name, flops, idle_share, peak_flops, peak_memory, reset_peak_memory
from random_models import BLIP_TOKENS, NAMES, random_pipeline, save_random_captioner, save_random_clip

from sgid_transforms import CaptionRecord, CaptionStore, Filters, GenerationError, Generator, Recipe, VariantStore, image_key
from sgid_transforms.building.builder import Builder
from sgid_transforms.building.wanted import Wanted
from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.filters import ImageFilter
from sgid_transforms.models.attention import apply_attention
from sgid_transforms.models.captioner import BLIP, Captioner
from sgid_transforms.models.loading import default_device, default_dtype, load_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP = "openai/clip-vit-base-patch32"
STAGES = ("caption", "text", "encode", "denoise", "decode", "filter", "store", "generate")
LABELS = ("cat", "dog", "horse", "ship", "truck")
WHOLE = ("diffusers 1", "diffusers B", "end to end")
WHY = ("of limit", "fill", "copies", "idle", "peak MiB")
PRESETS = {
    "quick": {"random_weights": ["sd-turbo"], "batch_size": [8, 32], "steps": [4], "images": 64, "single": 4},
    "full": {
        "random_weights": [*NAMES],
        "batch_size": [1, 8, 32],
        "steps": [20],
        "attention": ["sdpa", "xformers"],
        "compile": ["off", "on", "reduce-overhead"],
        "images": 64,
        "single": 4,
    },
}
"""What is measured on an accelerator where the command line does not say."""


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    model: str
    dtype: str
    attention: str
    compile: str
    resolution: int | None
    steps: int
    batch_size: int

    @property
    def loaded(self) -> tuple[Any, ...]:
        """What a loaded model can be kept for."""
        return (self.model, self.dtype, self.attention, self.compile)

    def __str__(self) -> str:
        parts = [
            Path(self.model).name,
            self.dtype,
            self.attention,
            *([] if self.compile == "off" else [f"compile={self.compile}"]),
        ]
        size = "" if self.resolution is None else f"{self.resolution} px, "
        return f"{' '.join(parts)}, {size}{self.steps} steps, batch {self.batch_size}"


@dataclass
class Loaded:
    """A model with its stopwatch, and the models beside it."""

    pipeline: Any
    watch: Stopwatch
    captioner: Captioner
    clip: str


def make_images(count: int, size: int) -> list[torch.Tensor]:
    """Smooth random pictures, uint8 ``(3, size, size)``."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 8, generator=generator)
    pictures = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    return list((pictures * 255).round().to(torch.uint8))


def load(configuration: Configuration, args: argparse.Namespace, folder: Path) -> Loaded:
    """The model of a configuration, watched.

    Raises:
        GenerationError: the model cannot be loaded or is not for the native engine, or the attention cannot run here.
    """
    dtype = DTYPES[configuration.dtype]
    name = configuration.model
    attention = "auto" if configuration.attention == "sdpa" else configuration.attention
    known = name in args.random_weights
    if known:
        pipeline = random_pipeline(name, dtype, args.device)
        apply_attention(pipeline, attention, args.device, dtype)
    else:
        pipeline = load_pipeline(name, device=args.device, dtype=dtype, attention=attention)
    if reason := NativeEngine.supports(pipeline):
        raise GenerationError(reason)
    watch = Stopwatch(args.device)
    watch.watch("denoise", pipeline.unet)
    watch.watch("encode", pipeline.vae.encoder)
    watch.watch("decode", pipeline.vae.decoder)
    for encoder in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, encoder, None) is not None:
            watch.watch("text", getattr(pipeline, encoder))
    captioner, clip = args.captioner, args.clip
    if captioner == "auto":
        captioner = save_random_captioner(folder / "blip") if known else "tiny" if name == "tiny" else BLIP
    if clip == "auto":
        clip = save_random_clip(folder / "clip") if known else "tiny" if name == "tiny" else CLIP
    tokens = {"max_new_tokens": BLIP_TOKENS} if known else {}
    half = None if configuration.dtype == "float32" else dtype
    return Loaded(pipeline, watch, Captioner(captioner, device=args.device, batch_size=32, dtype=half, **tokens), clip)


def recipe_of(configuration: Configuration, args: argparse.Namespace) -> Recipe:
    """One strength and one guidance scale for all images, as the baselines need it; a filter that looks and rejects nothing."""
    return Recipe.for_model(
        configuration.model,
        revision="benchmark",
        strength=args.strength,
        guidance=guidance_of(configuration.model, args.guidance),
        num_inference_steps=configuration.steps,
        resolution=configuration.resolution,
        filters=Filters(label_check="threshold", label_threshold=0.0, reject_nsfw=False, max_retries=0),
        caption_from="own",
        **({"sampler": args.sampler} if args.sampler else {}),
    )


def guidance_of(model: str, asked: float | None) -> float:
    """The guidance scale: what was asked for, else none for Turbo models, which are distilled without it, and 3 for others."""
    if asked is not None:
        return asked
    return 0.0 if "turbo" in Path(model).name.lower() else 3.0


def run_diffusers(pipeline: Any, images: Sequence[torch.Tensor], batch_size: int, recipe: Recipe, side: int) -> None:
    """diffusers' own call, ``batch_size`` images at a time."""
    for start in range(0, len(images), batch_size):
        group = torch.stack(list(images[start : start + batch_size])).float() / 255
        if group.shape[-1] != side:
            group = torch.nn.functional.interpolate(group, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pipeline(
            prompt=[f"a photo of a {LABELS[(start + i) % len(LABELS)]}, on grass" for i in range(len(group))],
            image=group,
            strength=recipe.strength,
            guidance_scale=recipe.guidance,
            num_inference_steps=recipe.num_inference_steps,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(group))],
            output_type="np",
        )


def median_rounds(run: Callable[[int], None], watch: Stopwatch, warmup: int, rounds: int) -> dict[str, float]:
    """Median seconds of a round, as ``total``, and of its stages."""
    seen: dict[str, list[float]] = defaultdict(list)
    for number in range(warmup + rounds):
        watch.take()
        watch.synchronise()
        started = time.perf_counter()
        run(number)
        watch.synchronise()
        total = time.perf_counter() - started
        stages = watch.take()
        if number >= warmup:
            for stage, seconds in (stages | {"total": total}).items():
                seen[stage].append(seconds)
    return {stage: statistics.median(values) for stage, values in seen.items()}


def measure_diffusers(loaded: Loaded, configuration: Configuration, args: argparse.Namespace) -> dict[str, float]:
    """Images per second of both baselines, and floating-point operations for an image.

    They come first: our engine changes the memory format of what it gets, and compiles it.
    """
    images, recipe = make_images(args.images, args.image_size), recipe_of(configuration, args)
    pipeline, watch, batch_size = loaded.pipeline, loaded.watch, configuration.batch_size
    side = configuration.resolution or int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)
    run = partial(run_diffusers, pipeline, recipe=recipe, side=side)
    figures = {}
    for name, some, size in (("diffusers 1", images[: max(args.single, 1)], 1), ("diffusers B", images, batch_size)):
        seconds = median_rounds(lambda _, some=some, size=size: run(some, size), watch, args.warmup, args.rounds)["total"]
        figures[name] = len(some) / seconds
    group = images[:batch_size]
    figures["TFLOP per image"] = flops(lambda: run(group, batch_size)) / len(group) / 1e12
    return figures


def measure_ours(loaded: Loaded, configuration: Configuration, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second of each stage and end to end, and why: fill, copies, idle share and peak memory."""
    images, recipe, watch = make_images(args.images, args.image_size), recipe_of(configuration, args), loaded.watch
    reset_peak_memory(args.device)
    generator = Generator.from_recipe(
        recipe,
        args.device,
        DTYPES[configuration.dtype],
        configuration.batch_size,
        labels=LABELS,
        clip=loaded.clip,
        compile={"off": False, "on": True}.get(configuration.compile, configuration.compile),
        pipeline=loaded.pipeline,
    )
    engine: Any = generator.engine
    notes = CaptionStore(folder / "captions.sqlite")
    builder = Builder(recipe, generator, VariantStore(folder / "variants"), notes)
    keys = [image_key(image) for image in images]

    def run(number: int) -> None:
        engine.forget_prompts()
        with watch.counting("caption"):
            captions = loaded.captioner.caption(images)
        labels = [LABELS[i % len(LABELS)] for i in range(len(keys))]
        notes.put_many(CaptionRecord(*one) for one in zip(keys, captions, labels, strict=True))
        # Another variant in each round: none of them is there.
        for outcome in builder([Wanted(key, number, image) for key, image in zip(keys, images, strict=True)]):
            if outcome.reason:
                raise RuntimeError(f"a variant could not be made: {outcome.reason}")

    before = engine.stats
    with ExitStack() as stack:
        stack.enter_context(watch.counting_stream("generate", engine))
        stack.enter_context(watch.counting_calls("filter", ImageFilter, "__call__"))
        stack.enter_context(watch.counting_calls("store", VariantStore, "put"))
        seconds = median_rounds(run, watch, args.warmup, args.rounds)
    done = engine.stats
    rates: dict[str, Any] = {stage: len(images) / seconds[stage] for stage in STAGES}
    rates["end to end"] = len(images) / seconds["total"]
    rates["fill"] = (done.unet_rows - before.unet_rows) / (done.row_capacity - before.row_capacity)
    rates["peak MiB"] = peak_memory(args.device)
    number = args.warmup + args.rounds
    with Copies() as copies:
        run(number)
    rates["copies there"], rates["copies back"] = copies.there / len(images), copies.back / len(images)
    rates["idle"] = idle_share(lambda: run(number + 1), args.device)
    return rates


def measure(configurations: Sequence[Configuration], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows, one for each configuration; one that cannot run here has the reason instead of figures."""
    rows = []
    for _, group in itertools.groupby(configurations, key=lambda one: one.loaded):
        members = list(group)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                loaded = load(members[0], args, folder)
            except GenerationError as error:
                rows += [asdict(one) | {"name": str(one), "skipped": str(error)} for one in members]
                print(f"{members[0]}: skipped, {error}", flush=True)
                continue
            peak = peak_flops(args.device, DTYPES[members[0].dtype])
            baselines = [measure_diffusers(loaded, one, args) for one in members]
            for number, (one, baseline) in enumerate(zip(members, baselines, strict=True)):
                rates = baseline | measure_ours(loaded, one, args, folder / str(number)) | {"peak TFLOP/s": peak / 1e12}
                rates["of limit"] = rates["generate"] * baseline["TFLOP per image"] * 1e12 / peak
                shown = {key: None if value is None else round(value, 5) for key, value in rates.items()}
                rows.append(asdict(one) | {"name": str(one)} | shown)
                print(f"{one}: {rates['end to end']:.2f} images/s end to end", flush=True)
            del loaded, baselines
            if torch.device(args.device).type != "cpu":
                torch.get_device_module(args.device).empty_cache()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: images per second, and why."""
    rates, why = (*STAGES[:-1], "generate", *WHOLE), ("TFLOP per image", "peak TFLOP/s", *WHY)
    return "\n\n".join(_table(title, rows, columns) for title, columns in (("images/s", rates), ("why", why)))


def _table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [f"| {title} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        cells = ["skipped"] + [""] * (len(columns) - 1) if "skipped" in row else [_shown(row, name) for name in columns]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(row: dict[str, Any], name: str) -> str:
    if name == "copies":
        return f"{row['copies there']:.2f} + {row['copies back']:.2f}"
    value = row[name]
    if value is None:
        return "n/a"
    if name in ("of limit", "fill", "idle"):
        return f"{value:.0%}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: images per second beside diffusers. Right: where the time of an image goes."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "skipped" not in row]
    if not rows:
        return
    figure = Figure(figsize=(13, 1.6 + 0.7 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ways = ("diffusers 1", "diffusers B", "generate", "end to end")
    for number, way in enumerate(ways):
        left.barh([place + 0.2 * (number - 1.5) for place in range(len(rows))], [row[way] for row in rows], 0.2, label=way)
    left.set_xlabel("images per second")
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    left.invert_yaxis()
    above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 7, "frameon": False, "fontsize": 8}
    left.legend(**above)
    starts = [0.0] * len(rows)
    for stage in ("caption", "text", "encode", "denoise", "decode", "filter", "store"):
        widths = [1000 / row[stage] for row in rows]
        right.barh(range(len(rows)), widths, 0.6, left=starts, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    right.set_xlabel("milliseconds per image")
    right.legend(**above)
    figure.savefig(path, dpi=120)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("sgid-transforms", "torch", "diffusers", "transformers")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="what is measured where nothing else is given")
    add("--model", nargs="+", default=[], help="tiny, folders or ids")
    add("--random-weights", nargs="+", choices=NAMES, default=[])
    add("--batch-size", nargs="+", type=int)
    add("--steps", nargs="+", type=int, help="num_inference_steps at strength 1")
    add("--resolution", nargs="+", type=int, default=[None], help="default: the model's own")
    add("--dtype", nargs="+", choices=DTYPES, help="default: the device's, as in SGIDAugment")
    add("--attention", nargs="+", choices=("sdpa", "xformers"))
    add("--compile", nargs="+", metavar="HOW", help="off, on, or a mode of torch.compile")
    add("--sampler", help="default: the model's preset")
    add("--strength", type=float, default=0.5)
    add("--guidance", type=float, help="1 or less: none; default: 0 for Turbo models, 3 for others")
    add("--captioner", default="auto", help="auto: bundled, random or BLIP, as the model is; else an id or a folder")
    add("--clip", default="auto", help="auto: bundled, random or CLIP, as the model is; else an id or a folder")
    add("--images", type=int, help="images in a round")
    add("--single", type=int, help="of them, for one image per call")
    add("--image-size", type=int, help="side of the pictures; default: 32 for tiny, else 512")
    add("--warmup", type=int, default=1, help="rounds before those that count")
    add("--rounds", type=int, default=3)
    add("--device", help="default: this machine's accelerator, else cpu")
    add("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    add("--out", type=Path, help="folder for throughput.json, throughput.md and throughput.png")
    args = parser.parse_args(arguments)
    fill_in(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    configurations = [
        Configuration(*one)
        for one in itertools.product(
            [*args.model, *args.random_weights],
            args.dtype,
            args.attention,
            args.compile,
            args.resolution,
            args.steps,
            args.batch_size,
        )
    ]
    about = machine(args.device)
    rows = measure(configurations, args)
    text = "\n".join(
        [
            f"Medians of {args.rounds} rounds of {args.images} images, strength {args.strength:g}",
            *(f"- {name}: {value}" for name, value in about.items()),
            "",
            table(rows),
        ]
    )
    print(f"\n{text}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        (args.out / "throughput.json").write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1))
        (args.out / "throughput.md").write_text(text + "\n")
        plot(rows, args.out / "throughput.png")


def fill_in(args: argparse.Namespace) -> None:
    """Set what the command line does not say, by the preset and the device."""
    args.device = args.device or default_device()
    on_cpu = torch.device(args.device).type == "cpu"
    defaults = {"batch_size": [16], "steps": [10], "attention": ["sdpa"], "compile": ["off"], "images": 64, "single": 8}
    if not args.model and not args.random_weights:
        if on_cpu:
            args.model = ["tiny"]
        else:
            defaults |= PRESETS[args.preset]
            args.random_weights = defaults.pop("random_weights")
    if args.dtype is None:
        args.dtype = [str(default_dtype(args.device)).removeprefix("torch.")]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.image_size is None:
        args.image_size = 32 if [*args.model, *args.random_weights] == ["tiny"] else 512


if __name__ == "__main__":
    main()
