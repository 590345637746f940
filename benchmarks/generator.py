"""Images per second of the native engine beside diffusers, in one run on one model.

    python benchmarks/generator.py                      # the bundled tiny model, float32
    python benchmarks/generator.py --dtype bfloat16
    python benchmarks/generator.py --model FOLDER --device cuda --dtype float16

Four ways:

  a  diffusers, one image per call
  b  diffusers, whole batches: one strength, one guidance scale, a list of generators
  c  this package's engine
  d  the bare limit: as many evaluations of text encoder, UNet, encoder and decoder as (c) needs, on full batches, with nothing
     around them

once with one strength for all images (`AT_ONCE` of them), and once with a strength for each of ``--images``, which (b) cannot
do, and of which (a) gets `AT_ONCE`, evenly chosen.
The ways take turns, forwards and backwards, (c) and (d) several times in a round, being close; a ratio is the median of the
ratios of neighbours, so that a machine that gets slower or faster meets both. ``--check`` fails where one of the ratios that
are `PROMISED` for two cores is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.generation.support import memory_formats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = Path(__file__).parents[1] / "src" / "sgid_transforms" / "assets" / "tiny" / "pipeline"
COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "yellow")

AT_ONCE = 64

# What (c) has to reach on two CPU cores with the bundled model, by scenario; docs/generation.md has what it does reach.
PROMISED = {"one": {"c/a": 3.0, "c/b": 1.0, "c/d": 0.97}, "each": {"c/a": 3.0, "c/d": 0.97}}


@dataclass(frozen=True)
class Settings:
    """What all four ways have in common."""

    steps: int
    guidance: float
    batch_size: int
    device: str


def load(model: str, dtype: torch.dtype, device: str) -> Any:
    """A pipeline of its own for each way: the engine changes the memory format of the one that it gets."""
    from diffusers import AutoPipelineForImage2Image
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    for log in (logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    with warnings.catch_warnings():  # diffusers is about to rename torch_dtype
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = AutoPipelineForImage2Image.from_pretrained(model, torch_dtype=dtype, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_requests(count: int, size: int, strengths: list[float], guidance: float) -> list[GenerationRequest]:
    """Requests for smooth random pictures, each with a prompt and a seed of its own."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 8, 8, generator=generator)
    pictures = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    pixels = (pictures * 255).round().to(torch.uint8)
    return [
        GenerationRequest(
            image=pixels[i],
            prompt=f"a photo of a cat, a {COLOURS[i % 8]} cat on a {COLOURS[i // 8 % 8]} ground",
            strength=strengths[i],
            guidance_scale=guidance,
            seed=i,
        )
        for i in range(count)
    ]


def run_diffusers(pipeline: Any, requests: list[GenerationRequest], settings: Settings, batch_size: int) -> None:
    """(a) and (b): ``batch_size`` images in one call; all of one call have one strength."""
    for start in range(0, len(requests), batch_size):
        group = requests[start : start + batch_size]
        pipeline(
            prompt=[r.prompt for r in group],
            image=torch.stack([r.image for r in group]).float() / 255,
            strength=group[0].strength,
            guidance_scale=settings.guidance,
            num_inference_steps=settings.steps,
            generator=[torch.Generator().manual_seed(r.seed) for r in group],
            output_type="np",
        )


def run_engine(engine: NativeEngine, requests: list[GenerationRequest]) -> None:
    """(c), with all texts encoded anew in each round, as (a) and (b) do."""
    engine.forget_prompts()
    for result in engine.run(requests):
        if isinstance(result, Exception):
            raise result


def bare(pipeline: Any, rows: int, images: int, size: int, settings: Settings) -> Callable[[], None]:
    """(d): the modules alone, laid out as the engine has them, on inputs made beforehand."""
    unet, vae, device = pipeline.unet, pipeline.vae, settings.device
    formats = memory_formats(None, device)
    batch_rows = 2 * settings.batch_size if settings.guidance > 1 else settings.batch_size
    options = {"device": device, "dtype": unet.dtype}
    edge = size // pipeline.vae_scale_factor
    x = torch.randn(batch_rows, unet.config.in_channels, edge, edge, **options).contiguous(memory_format=formats.unet)
    t = torch.linspace(100, 800, batch_rows, device=device)
    length = pipeline.tokenizer.model_max_length
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    ids = torch.full((settings.batch_size, length), pipeline.tokenizer.eos_token_id, device=device)
    text = torch.randn(batch_rows, length, unet.config.cross_attention_dim, **options)
    pixels = torch.rand(settings.batch_size, 3, size, size, **options).contiguous(memory_format=formats.vae)
    latents = x[: settings.batch_size].contiguous(memory_format=formats.vae)
    added = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = torch.randn(batch_rows, pipeline.text_encoder_2.config.projection_dim, **options)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * batch_rows, **options)}

    @torch.no_grad()
    def run() -> None:
        for start in range(0, images, settings.batch_size):
            for encoder in filter(None, encoders):
                encoder(ids[: min(settings.batch_size, images - start)])
            vae.encode(pixels[: min(settings.batch_size, images - start)])
        for start in range(0, rows, batch_rows):
            n = min(batch_rows, rows - start)
            unet(
                x[:n],
                t[:n],
                encoder_hidden_states=text[:n],
                added_cond_kwargs={key: value[:n] for key, value in added.items()} or None,
                return_dict=False,
            )
        for start in range(0, images, settings.batch_size):
            vae.decode(latents[: min(settings.batch_size, images - start)], return_dict=False)

    return run


def measure(ways: dict[str, Callable[[], None]], rounds: int, pairs: int, device: str) -> dict[str, list[list[float]]]:
    """Seconds of each way in each round; every second round, and every second pair of (c) and (d) in it, goes backwards."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in range(rounds)] for name in ways}
    for number in range(rounds):
        turns = [name for name in ways if name in "ab"]
        for pair in range(pairs):
            turns += "cd" if pair % 2 == 0 else "dc"
        for name in turns if number % 2 == 0 else reversed(turns):
            started = time.perf_counter()
            ways[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name][number].append(time.perf_counter() - started)
    return seconds


def summarize(seconds: dict[str, list[list[float]]], count: int, counts: dict[str, int] | None = None) -> dict[str, Any]:
    """Images per second of each way, and how many times as fast (c) is as each other one; ``counts`` has the images of ways
    that made fewer than ``count``.

    (d) is compared within each pair, (a) and (b) with the median of (c) within a round; all figures are medians.
    """
    # As if all had made as many
    scales = {name: count / (counts or {}).get(name, count) for name in seconds}
    seconds = {name: [[t * scales[name] for t in times] for times in per_round] for name, per_round in seconds.items()}
    own = seconds["c"]
    ratios = {
        f"c/{name}": [
            t / c
            for times, cs in zip(per_round, own, strict=True)
            for t, c in zip(times, cs if name == "d" else [median(cs)] * len(times), strict=True)
        ]
        for name, per_round in seconds.items()
        if name != "c"
    }
    return {
        "images": count,
        "seconds": {name: [[round(t, 4) for t in times] for times in per_round] for name, per_round in seconds.items()},
        "images_per_second": {name: count / median(t for times in each for t in times) for name, each in seconds.items()},
        "ratios": {name: median(values) for name, values in ratios.items()},
        "spread": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def print_summary(title: str, summary: dict[str, Any]) -> None:
    labels = {"a": "diffusers, one per call", "b": "diffusers, batched", "c": "this engine", "d": "bare limit"}
    print(f"\n{title}", flush=True)
    for name, rate in summary["images_per_second"].items():
        line = f"  {name}  {labels[name]:24} {rate:8.2f} images/s  {1000 / rate:8.1f} ms each"
        if name != "c":
            low, high = summary["spread"][f"c/{name}"]
            line += f"   c/{name} {summary['ratios'][f'c/{name}']:.2f} ({low:.2f} to {high:.2f})"
        print(line, flush=True)
    print(
        f"     UNet rows per run: {summary['rows']}, {summary['rows_needed']} are needed; {summary['calls']} calls, "
        f"{summary['fill']:.0%} full",
        flush=True,
    )


def missed(figures: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for each promised ratio that was measured and not reached."""
    return [
        f"{scenario}: {name} is {figures[scenario]['ratios'][name]:.3f}, promised are {least}"
        for scenario, promises in PROMISED.items()
        if scenario in figures
        for name, least in promises.items()
        if figures[scenario]["ratios"][name] < least
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="folder or id of a Stable Diffusion pipeline")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2, help="times that (c) and (d) run in a round")
    parser.add_argument("--only", choices=("one", "each"), help="measure only one strength, or only a strength for each image")
    parser.add_argument("--check", action="store_true", help="exit with an error if a promised ratio is missed")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)

    started = time.perf_counter()
    dtype = DTYPES[args.dtype]
    settings = Settings(args.steps, args.guidance, args.batch_size, args.device)
    theirs, ours = (load(args.model, dtype, args.device) for _ in range(2))
    engine = NativeEngine(
        ours, sampler=args.sampler, num_inference_steps=args.steps, batch_size=args.batch_size, device=args.device, dtype=dtype
    )
    size = int(ours.unet.config.sample_size) * int(ours.vae_scale_factor)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{Path(args.model).name}: {args.images} images of {size} x {size}, {args.steps} steps, guidance {args.guidance:g}, "
        f"{args.dtype}, batches of {args.batch_size}, {device}, torch {torch.__version__}"
    )

    same = make_requests(args.images, size, [args.strength] * args.images, args.guidance)
    spread = [0.2 + 0.6 * i / max(args.images - 1, 1) for i in range(args.images)]
    mixed = [replace(request, strength=strength) for request, strength in zip(same, spread, strict=True)]
    scenarios = {"one": same[:AT_ONCE], "each": mixed}
    titles = {"one": f"one strength, {args.strength:g}", "each": "a strength for each image, 0.2 to 0.8"}
    figures: dict[str, dict[str, Any]] = {}
    for scenario, requests in scenarios.items():
        if args.only not in (None, scenario):
            continue
        rows = sum(engine.evaluations(request) for request in requests)
        some = requests[:: -(-len(requests) // AT_ONCE)]
        ways: dict[str, Callable[[], None]] = {"a": partial(run_diffusers, theirs, some, settings, 1)}
        if scenario == "one":
            ways["b"] = partial(run_diffusers, theirs, requests, settings, args.batch_size)
        ways["c"] = partial(run_engine, engine, requests)
        ways["d"] = bare(ours, rows, len(requests), size, settings)
        # Warm up: one batch for the batched ways, two calls for (a)
        run_diffusers(theirs, same[:2], settings, 1)
        if scenario == "one":
            run_diffusers(theirs, same[: args.batch_size], settings, args.batch_size)
        run_engine(engine, same[: args.batch_size])
        bare(ours, 2 * args.batch_size, args.batch_size, size, settings)()
        before = engine.stats
        summary = summarize(measure(ways, args.rounds, args.pairs, args.device), len(requests), {"a": len(some)})
        done = (engine.stats.unet_rows - before.unet_rows) // (args.rounds * args.pairs)
        calls = (engine.stats.unet_calls - before.unet_calls) // (args.rounds * args.pairs)
        fill = done / (calls * 2 * args.batch_size)
        figures[scenario] = summary | {"rows": done, "rows_needed": rows, "calls": calls, "fill": round(fill, 3)}
        print_summary(titles[scenario], figures[scenario])
    elapsed = time.perf_counter() - started
    print(f"\n{elapsed:.0f} s in all")
    if args.json:
        machine = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "elapsed_s": elapsed}
        given = {key: value for key, value in vars(args).items() if key not in ("json", "check", "only")}
        args.json.write_text(json.dumps({"settings": given | machine, "figures": figures}, indent=1) + "\n")
    failures = missed(figures) if args.check else []
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
