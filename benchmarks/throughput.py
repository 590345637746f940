"""Images per second of each stage of the way from an image to a stored variant, beside diffusers, in one run.

    python benchmarks/throughput.py                                             # the bundled tiny model
    python benchmarks/throughput.py --batch-size 1 8 32 --steps 4 10 --dtype float32 bfloat16
    python benchmarks/throughput.py --random-weights sd15 sd-turbo sdxl --device cuda --dtype float16 --batch-size 1 8 32
    python benchmarks/throughput.py --random-weights sdxl --device cuda --dtype bfloat16 --attention sdpa xformers
    python benchmarks/throughput.py --model stabilityai/sd-turbo --device cuda --compile off on --resolution 512 768

All combinations of what is given more than once are measured. The stages are measured in place, in one and the same run of
the real thing: hooks on the networks, on CUDA by events, on a CPU by the clock.

  caption    the captioner, tokens and all          denoise   UNet calls
  text       text encoder calls                     decode    VAE decoder calls
  encode     VAE encoder calls                      filter    CLIP's label check of finished images
  generate   requests to images, all included       store     file format, digest and disk
  end to end caption to stored file

Beside it, with the same model, strength and steps: ``diffusers 1``, its pipeline with one image per call, and ``diffusers B``,
with whole batches; they compare with ``generate``. The first rounds warm up; the figures are medians of the others. Peak
memory is the device's on CUDA, the process's on a CPU. ``--random-weights`` builds a true architecture without any download,
with a captioner and a CLIP as large as BLIP's and CLIP's base models: pictures are noise, and the time is the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import BLIP_TOKENS, NAMES, random_pipeline, save_random_captioner, save_random_clip

from sgid_transforms import CaptionRecord, CaptionStore, Filters, GenerationError, Generator, Recipe, VariantStore, image_key
from sgid_transforms.building.builder import Builder
from sgid_transforms.building.wanted import Wanted
from sgid_transforms.generation.filters import ImageFilter
from sgid_transforms.models.attention import apply_attention
from sgid_transforms.models.captioner import BLIP, Captioner
from sgid_transforms.models.loading import load_pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP = "openai/clip-vit-base-patch32"
STAGES = ("caption", "text", "encode", "denoise", "decode", "filter", "store", "generate")
LABELS = ("cat", "dog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Configuration:
    """One row of the table."""

    model: str
    dtype: str
    attention: str
    compile: bool
    resolution: int | None
    steps: int
    batch_size: int

    @property
    def loaded(self) -> tuple[Any, ...]:
        """What a loaded model can be kept for."""
        return (self.model, self.dtype, self.attention, self.compile)

    def __str__(self) -> str:
        parts = [Path(self.model).name, self.dtype, self.attention, *(["compiled"] if self.compile else [])]
        size = "" if self.resolution is None else f"{self.resolution} px, "
        return f"{' '.join(parts)}, {size}{self.steps} steps, batch {self.batch_size}"


class Stopwatch:
    """Seconds by stage. On CUDA, networks are timed by events, which do not make the device wait."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def synchronise(self) -> None:
        """Wait for what the device still has to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def watch(self, stage: str, module: torch.nn.Module) -> None:
        """Count the calls of a network to a stage."""
        module.register_forward_pre_hook(lambda *_: self._start(stage))
        module.register_forward_hook(lambda *_: self._stop(stage))

    @contextmanager
    def counting(self, stage: str) -> Iterator[None]:
        """Count what is done inside to a stage, by the clock."""
        self.synchronise()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.synchronise()
            self._seconds[stage] += time.perf_counter() - started

    @contextmanager
    def counting_calls(self, stage: str, owner: Any, name: str) -> Iterator[None]:
        """Count all calls of a method to a stage, while inside."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counting(stage):
                return original(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            yield
        finally:
            setattr(owner, name, original)

    @contextmanager
    def counting_stream(self, stage: str, engine: Any) -> Iterator[None]:
        """Count to a stage what an engine's stream does between its answers, while inside."""
        original = engine.stream

        def counted(pull: Any) -> Iterator[Any]:
            answers = original(pull)
            while True:
                with self.counting(stage):
                    group = next(answers, None)
                if group is None:
                    return
                yield group

        engine.stream = counted
        try:
            yield
        finally:
            del engine.stream

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        self.synchronise()
        for stage, start, stop in self._events:
            self._seconds[stage] += start.elapsed_time(stop) / 1000
        taken = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return taken

    def _start(self, stage: str) -> None:
        self._open[stage] = self._mark()

    def _stop(self, stage: str) -> None:
        start = self._open.pop(stage)
        if self.cuda:
            self._events.append((stage, start, self._mark()))
        else:
            self._seconds[stage] += self._mark() - start

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


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
        GenerationError: the attention that was asked for cannot run here.
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


def peak_memory(device: str) -> float:
    """MiB: the most that CUDA held since the last reset, or that this process ever had."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_diffusers(loaded: Loaded, configuration: Configuration, args: argparse.Namespace) -> dict[str, float]:
    """Images per second of both baselines. They come first: our engine changes the memory format of what it gets."""
    images, recipe = make_images(args.images, args.image_size), recipe_of(configuration, args)
    pipeline, watch = loaded.pipeline, loaded.watch
    side = configuration.resolution or int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)
    rates = {}
    for name, batch_size in (("diffusers 1", 1), ("diffusers B", configuration.batch_size)):
        some = images[: max(args.single, 1)] if batch_size == 1 else images

        def run(_: int, some: list[torch.Tensor] = some, batch_size: int = batch_size) -> None:
            run_diffusers(pipeline, some, batch_size, recipe, side)

        rates[name] = len(some) / median_rounds(run, watch, args.warmup, args.rounds)["total"]
    return rates


def measure_ours(loaded: Loaded, configuration: Configuration, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images per second of each stage and end to end, and peak memory."""
    images, recipe, watch = make_images(args.images, args.image_size), recipe_of(configuration, args), loaded.watch
    if watch.cuda:
        torch.cuda.reset_peak_memory_stats()
    generator = Generator.from_recipe(
        recipe,
        args.device,
        DTYPES[configuration.dtype],
        configuration.batch_size,
        labels=LABELS,
        clip=loaded.clip,
        compile=configuration.compile,
        pipeline=loaded.pipeline,
    )
    notes = CaptionStore(folder / "captions.sqlite")
    builder = Builder(recipe, generator, VariantStore(folder / "variants"), notes)
    keys = [image_key(image) for image in images]

    def run(number: int) -> None:
        forget = getattr(generator.engine, "forget_prompts", None)
        if forget is not None:
            forget()
        with watch.counting("caption"):
            captions = loaded.captioner.caption(images)
        labels = [LABELS[i % len(LABELS)] for i in range(len(keys))]
        notes.put_many(CaptionRecord(*one) for one in zip(keys, captions, labels, strict=True))
        # Another variant in each round: none of them is there.
        for outcome in builder([Wanted(key, number, image) for key, image in zip(keys, images, strict=True)]):
            if outcome.reason:
                raise RuntimeError(f"a variant could not be made: {outcome.reason}")

    with (
        watch.counting_stream("generate", generator.engine),
        watch.counting_calls("filter", ImageFilter, "__call__"),
        watch.counting_calls("store", VariantStore, "put"),
    ):
        seconds = median_rounds(run, watch, args.warmup, args.rounds)
    rates = {stage: len(images) / seconds[stage] for stage in STAGES}
    rates["end to end"] = len(images) / seconds["total"]
    rates["peak MiB"] = peak_memory(args.device)
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
            baselines = [measure_diffusers(loaded, one, args) for one in members]
            for number, (one, baseline) in enumerate(zip(members, baselines, strict=True)):
                rates = baseline | measure_ours(loaded, one, args, folder / str(number))
                rows.append(asdict(one) | {"name": str(one)} | {key: round(value, 3) for key, value in rates.items()})
                print(f"{one}: {rates['end to end']:.2f} images/s end to end", flush=True)
            del loaded
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of images per second."""
    columns = (*STAGES[:-1], "generate", "diffusers 1", "diffusers B", "end to end", "peak MiB")
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        cells = ["skipped"] + [""] * (len(columns) - 1) if "skipped" in row else [_shown(row[name]) for name in columns]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    left.legend()
    starts = [0.0] * len(rows)
    for stage in ("caption", "text", "encode", "denoise", "decode", "filter", "store"):
        widths = [1000 / row[stage] for row in rows]
        right.barh(range(len(rows)), widths, 0.6, left=starts, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    right.set_xlabel("milliseconds per image")
    right.legend()
    figure.savefig(path, dpi=120)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[], help="tiny, folders or ids; default: tiny, unless --random-weights is given")
    add("--random-weights", nargs="+", choices=NAMES, default=[])
    add("--batch-size", nargs="+", type=int, default=[16])
    add("--steps", nargs="+", type=int, default=[10], help="num_inference_steps at strength 1")
    add("--resolution", nargs="+", type=int, default=[None], help="default: the model's own")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--attention", nargs="+", choices=("sdpa", "xformers"), default=["sdpa"])
    add("--compile", nargs="+", choices=("off", "on"), default=["off"])
    add("--sampler", help="default: the model's preset")
    add("--strength", type=float, default=0.5)
    add("--guidance", type=float, help="1 or less: none; default: 0 for Turbo models, 3 for others")
    add("--captioner", default="auto", help="auto: bundled, random or BLIP, as the model is; else an id or a folder")
    add("--clip", default="auto", help="auto: bundled, random or CLIP, as the model is; else an id or a folder")
    add("--images", type=int, default=64, help="images in a round")
    add("--single", type=int, default=8, help="of them, for one image per call")
    add("--image-size", type=int, default=None, help="side of the pictures; default: 32 for tiny, else 512")
    add("--warmup", type=int, default=1, help="rounds before those that count")
    add("--rounds", type=int, default=3)
    add("--device", default="cpu")
    add("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    add("--out", type=Path, help="folder for throughput.json, throughput.md and throughput.png")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = [*args.model, *args.random_weights] or ["tiny"]
    if args.image_size is None:
        args.image_size = 32 if models == ["tiny"] else 512
    configurations = [
        Configuration(model, dtype, attention, compiled == "on", resolution, steps, batch_size)
        for model, dtype, attention, compiled, resolution, steps, batch_size in itertools.product(
            models, args.dtype, args.attention, args.compile, args.resolution, args.steps, args.batch_size
        )
    ]
    rows = measure(configurations, args)
    text = table(rows)
    print(f"\nimages per second, medians of {args.rounds} rounds of {args.images} images\n\n{text}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        report = {"machine": machine(args.device), "settings": settings, "rows": rows}
        (args.out / "throughput.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "throughput.md").write_text(text + "\n")
        plot(rows, args.out / "throughput.png")


if __name__ == "__main__":
    main()
