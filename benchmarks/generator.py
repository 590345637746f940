"""Images per second of the native engine beside diffusers, in one run on one model.

    python benchmarks/generator.py                      # the bundled tiny model, fp32
    python benchmarks/generator.py --dtype bfloat16
    python benchmarks/generator.py --model FOLDER --device cuda --dtype float16

Four ways, interleaved, the best of several rounds each:

  a  diffusers, one image per call
  b  diffusers, whole batches: one strength, one guidance scale, a list of generators
  c  this package's engine
  d  the bare limit: as many UNet, encoder and decoder evaluations as (c) needs, on full batches, with nothing around them

once with one strength for all images, and once with a strength for each image, which (b) cannot do.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import GenerationRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = Path(__file__).parents[1] / "src" / "sgid_transforms" / "tiny" / "pipeline"
COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "yellow")


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
    """(d): the modules alone, on inputs made beforehand."""
    unet, vae, device = pipeline.unet, pipeline.vae, settings.device
    batch_rows = 2 * settings.batch_size if settings.guidance > 1 else settings.batch_size
    options = {"device": device, "dtype": unet.dtype}
    edge = size // pipeline.vae_scale_factor
    x = torch.randn(batch_rows, unet.config.in_channels, edge, edge, **options).contiguous(memory_format=torch.channels_last)
    t = torch.linspace(100, 800, batch_rows, device=device)
    length = pipeline.tokenizer.model_max_length
    text = torch.randn(batch_rows, length, unet.config.cross_attention_dim, **options)
    pixels = torch.rand(settings.batch_size, 3, size, size, **options).contiguous(memory_format=torch.channels_last)
    added = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = torch.randn(batch_rows, pipeline.text_encoder_2.config.projection_dim, **options)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * batch_rows, **options)}

    @torch.no_grad()
    def run() -> None:
        for start in range(0, images, settings.batch_size):
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
            n = min(settings.batch_size, images - start)
            vae.decode(x[:n], return_dict=False)

    return run


def measure(ways: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Best seconds of each way; the ways take turns, so that a slow moment of the machine meets them all."""
    best = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def report(title: str, seconds: dict[str, float], count: int) -> dict[str, float]:
    """Print images per second and ratios; return them."""
    rates = {name: count / value for name, value in seconds.items()}
    ratios = {f"c/{name}": rates["c"] / rates[name] for name in rates if name != "c"}
    print(f"\n{title}", flush=True)
    labels = {"a": "diffusers, one per call", "b": "diffusers, batched", "c": "this engine", "d": "bare limit"}
    for name, rate in rates.items():
        ratio = "" if name == "c" else f"   c/{name} {ratios[f'c/{name}']:.2f}"
        print(f"  {name}  {labels[name]:24} {rate:8.2f} images/s  {1000 / rate:8.1f} ms each{ratio}")
    return {key: round(value, 3) for key, value in [*((f"{n} images/s", rate) for n, rate in rates.items()), *ratios.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="folder or id of a Stable Diffusion pipeline")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("one", "each"), help="measure only one strength, or only a strength for each image")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    dtype = DTYPES[args.dtype]
    settings = Settings(args.steps, args.guidance, args.batch_size, args.device)
    theirs, ours = (load(args.model, dtype, args.device) for _ in range(2))
    engine = NativeEngine(
        ours, sampler=args.sampler, num_inference_steps=args.steps, batch_size=args.batch_size, device=args.device, dtype=dtype
    )
    size = int(ours.unet.config.sample_size) * int(ours.vae_scale_factor)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{args.model}: {args.images} images of {size} x {size}, {args.steps} steps, guidance {args.guidance:g}, "
        f"{args.dtype}, batches of {args.batch_size}, {device}, torch {torch.__version__}"
    )

    same = make_requests(args.images, size, [args.strength] * args.images, args.guidance)
    spread = [0.2 + 0.6 * i / max(args.images - 1, 1) for i in range(args.images)]
    mixed = [replace(request, strength=strength) for request, strength in zip(same, spread, strict=True)]
    figures: dict[str, dict[str, float]] = {}
    for title, requests in ((f"one strength, {args.strength:g}", same), ("a strength for each image, 0.2 to 0.8", mixed)):
        if args.only and (args.only == "one") != (requests is same):
            continue
        rows = sum(engine.evaluations(request) for request in requests)
        ways: dict[str, Callable[[], None]] = {"a": lambda r=requests: run_diffusers(theirs, r, settings, 1)}
        if requests is same:
            ways["b"] = lambda r=requests: run_diffusers(theirs, r, settings, args.batch_size)
        ways["c"] = lambda r=requests: run_engine(engine, r)
        ways["d"] = bare(ours, rows, args.images, size, settings)
        # Warm up: one batch for the batched ways, two calls for (a)
        run_diffusers(theirs, requests[:2], settings, 1)
        run_diffusers(theirs, requests[: args.batch_size], settings, args.batch_size)
        run_engine(engine, requests[: args.batch_size])
        bare(ours, 2 * args.batch_size, args.batch_size, size, settings)()
        before = engine.stats
        figures[title] = report(title, measure(ways, args.rounds, args.device), args.images)
        done = (engine.stats.unet_rows - before.unet_rows) // args.rounds
        calls = (engine.stats.unet_calls - before.unet_calls) // args.rounds
        fill = done / (calls * 2 * args.batch_size)
        print(f"     UNet rows per round: {done}, {rows} are needed; {calls} calls, {fill:.0%} full")
        figures[title] |= {"rows": done, "rows needed": rows, "calls": calls, "fill": round(fill, 3)}
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": str(args.json)}, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
