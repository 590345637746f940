"""Time to quality: milliseconds per variant against label agreement and diversity, over samplers, steps and guidance.

    python benchmarks/quality_speed.py --out quality_speed          # writes a folder: JSON, a Markdown table, a plot

Every configuration makes the same variants (same images, prompts, strengths and seeds). For each, the script measures

  agreement  share of variants whose class, according to an independent judge, is the label of their image, in points
  diversity  mean distance between two variants of one image, 100 * (1 - cosine) of the judge's features, in points
  change     the same distance between a variant and its image
  ms         milliseconds per variant, texts, encoder and decoder included

and compares with a reference: diffusers' own pipeline in whole batches, DDIM, 20 steps, float32, guidance everywhere. First
all configurations are screened on ``--images`` images, in the faster data type; then the fastest of those that may equal the
reference are measured on ``--final`` images, and timed beside diffusers, taking turns. The winner is the fastest whose
agreement and diversity are at most one point below the reference's. ``+-`` is the standard error of the difference to the
reference, image by image.

Needs CIFAR-10 as tools/train_tiny reads it, and the judge, weights of tools/train_tiny/classifier.py. What a folder already
holds for the same weights and settings is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generator import DTYPES, TINY, load
from torch import Tensor, nn
from torch.nn import functional as F

from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import GenerationRequest
from sgid_transforms.models.loading import compile_pipeline

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "train_tiny"
sys.path.insert(0, str(TOOLS))

VARIANTS = 2  # per image: enough for a distance between them
MARGIN = 1.0  # points of agreement and of diversity that a configuration may lose


@dataclass(frozen=True)
class Configuration:
    """One point of the search."""

    sampler: str
    steps: int
    interval: tuple[float, float] = (0.0, 1.0)
    exact: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        low, high = self.interval
        where = "" if self.interval == (0.0, 1.0) else f" guided {low:g}-{high:g}"
        return f"{self.sampler} {self.steps}{where}{' exact' if self.exact else ''} {self.dtype}"


REFERENCE = Configuration("ddim", 20)


@dataclass
class Measured:
    """What one configuration made of the first images: one entry for each variant, or each image.

    Args:
        correct: 1 where the judge sees the label, for each variant.
        distance: between the variants of an image, in points.
        change: between a variant and its image, in points, for each variant.
        seconds: that the engine took for all of them.
    """

    correct: list[int]
    distance: list[float]
    change: list[float]
    seconds: float

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.correct + other.correct,
            self.distance + other.distance,
            self.change + other.change,
            self.seconds + other.seconds,
        )


class Judge:
    """A classifier, and the input of its last linear layer as features.

    Args:
        model: any ``nn.Module`` that maps its own input to class scores and ends on a linear layer.
        normalize: from uint8 ``(N, 3, H, W)`` to the model's input.
    """

    def __init__(self, model: nn.Module, normalize: Any) -> None:
        self._model = model.eval()
        self._normalize = normalize
        self._features: Tensor | None = None
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._features = args[0]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class ``(N,)`` and unit features ``(N, D)`` of uint8 images, over each image and its mirror."""
        classes, features = [], []
        for batch in images.split(500):
            x = self._normalize(batch)
            scores = self._model(x)
            kept = self._features
            scores = scores + self._model(x.flip(-1))
            assert kept is not None
            assert self._features is not None
            classes.append(scores.argmax(1))
            features.append(F.normalize(kept + self._features, dim=-1))
        return torch.cat(classes), torch.cat(features)


def make_requests(data: Any, count: int, guidance: float, strengths: tuple[float, float]) -> list[GenerationRequest]:
    """``VARIANTS`` requests for each of the first ``count`` images: label and caption, strengths spread over the range."""
    from data import CLASSES
    from words import article, caption, describe

    looks = describe(data.images[:count])
    low, high = strengths
    requests = []
    for i in range(count):
        text = caption(data.subnames[i], looks[i])
        for variant in range(VARIANTS):
            n = i * VARIANTS + variant
            place = (n * 0.6180339887498949) % 1  # the golden ratio spreads any number of points evenly
            requests.append(
                GenerationRequest(
                    image=data.images[i],
                    prompt=f"a photo of {article(CLASSES[int(data.labels[i])])}, {text}",
                    strength=low + (high - low) * place,
                    guidance_scale=guidance,
                    seed=n,
                )
            )
    return requests


def judge_variants(judge: Judge, variants: Tensor, originals: Tensor, labels: Tensor, seconds: float) -> Measured:
    """Judge variants ``(N * VARIANTS, 3, H, W)`` of ``N`` images."""
    classes, features = judge(variants)
    _, original = judge(originals)
    features = features.unflatten(0, (-1, VARIANTS))
    pairs = [1 - (features[:, a] * features[:, b]).sum(-1) for a in range(VARIANTS) for b in range(a)]
    change = 1 - (features * original[:, None]).sum(-1)
    return Measured(
        (classes == labels.repeat_interleave(VARIANTS)).int().tolist(),
        [round(value, 3) for value in (100 * torch.stack(pairs).mean(0)).tolist()],
        [round(value, 3) for value in (100 * change).flatten().tolist()],
        seconds,
    )


def standard_error(values: Tensor) -> float:
    """Of the mean of ``values``, 1-D."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.inf


def compare(measured: Measured, reference: Measured) -> dict[str, float]:
    """Means in points, and standard errors of the differences to a reference, over the images that both have."""
    count = min(len(measured.distance), len(reference.distance))
    correct, first = (
        100 * torch.tensor(m.correct[: count * VARIANTS]).float().view(count, VARIANTS).mean(1) for m in (measured, reference)
    )
    distance, first_distance = (torch.tensor(m.distance[:count]) for m in (measured, reference))
    return {
        "images": count,
        "agreement": correct.mean().item(),
        "agreement_difference": (correct - first).mean().item(),
        "agreement_error": standard_error(correct - first),
        "diversity": distance.mean().item(),
        "diversity_difference": (distance - first_distance).mean().item(),
        "diversity_error": standard_error(distance - first_distance),
        "change": sum(measured.change[: count * VARIANTS]) / (count * VARIANTS),
    }


def search_space(dtype: str) -> list[Configuration]:
    """What is screened. In these noise levels Euler's steps are DDIM's: one of them is enough to show it."""
    found = [Configuration(sampler, n, exact=True) for sampler in ("dpmsolver++", "ddim") for n in (3, 4, 5, 6, 8)]
    intervals = ((0.25, 1.0), (0.4, 1.0), (0.0, 0.5), (0.0, 0.75), (0.2, 0.7))
    found += [Configuration("dpmsolver++", n, interval, exact=True) for n in (4, 6) for interval in intervals]
    found += [Configuration("euler", 5, exact=True), Configuration("dpmsolver++", 8), Configuration("dpmsolver++", 10)]
    # LCM's way of sampling: denoise, then noise again
    found += [Configuration("ddim", 10), *(Configuration("lcm", n) for n in (4, 6, 8))]
    return [replace(configuration, dtype=dtype) for configuration in found]


def runs_all(configuration: Configuration, strengths: tuple[float, float]) -> bool:
    """Whether the lowest strength leaves a step."""
    return configuration.exact or int(configuration.steps * strengths[0]) >= 1


def may_be_equal(row: dict[str, Any], errors: float = 0.0) -> bool:
    """Whether a row loses at most `MARGIN` points to the reference, give or take ``errors`` standard errors."""
    return all(row[f"{name}_difference"] + errors * row[f"{name}_error"] >= -MARGIN for name in ("agreement", "diversity"))


class Search:
    """Makes, judges and times variants of one set of images, and keeps what it measured.

    Args:
        model: folder of the pipeline.
        data: images with labels and words.
        judge: what looks at the variants.
        args: the command line.
        kept: measurements of an earlier run, by configuration.
    """

    def __init__(self, model: str, data: Any, judge: Judge, args: argparse.Namespace, kept: dict[str, Measured]) -> None:
        self.model, self.data, self.judge, self.args, self.measured = model, data, judge, args, kept
        self.requests = make_requests(data, len(data), args.guidance, tuple(args.strengths))
        self._pipelines: dict[str, Any] = {}

    def engine(self, configuration: Configuration, compiled: bool = False) -> NativeEngine:
        key = f"{configuration.dtype} {compiled}"
        if key not in self._pipelines:
            self._pipelines[key] = load(self.model, DTYPES[configuration.dtype], self.args.device)
            if compiled:
                compile_pipeline(self._pipelines[key])
        engine = NativeEngine(
            self._pipelines[key],
            sampler=configuration.sampler,
            num_inference_steps=configuration.steps,
            guidance_interval=configuration.interval,
            exact_strength=configuration.exact,
            batch_size=self.args.batch_size,
        )
        return engine

    def measure(self, configuration: Configuration, images: int) -> Measured:
        """What a configuration makes of the first ``images``; only those that are missing are made."""
        name = str(configuration)
        start = len(self.measured[name].distance) if name in self.measured else 0
        if start < images:
            engine = self.engine(configuration)
            run(engine, self.requests[: min(self.args.batch_size, 4)])  # warms up
            requests = self.requests[start * VARIANTS : images * VARIANTS]
            began = time.perf_counter()
            variants = run(engine, requests)
            seconds = time.perf_counter() - began
            part = judge_variants(
                self.judge, torch.stack(variants), self.data.images[start:images], self.data.labels[start:images], seconds
            )
            self.measured[name] = self.measured[name] + part if start else part
        return self.measured[name]

    def row(self, configuration: Configuration) -> dict[str, Any]:
        """A line of the table: settings, quality beside the reference's, and time."""
        measured = self.measured[str(configuration)]
        engine = self.engine(configuration)
        rows = sum(engine.evaluations(request) for request in self.requests) / len(self.requests)
        ms = 1000 * measured.seconds / len(measured.correct)
        quality = compare(measured, self.measured[str(REFERENCE)])
        return {"name": str(configuration), **asdict(configuration), "ms": ms, "unet_rows": rows, **quality}

    def time_all(self, finalists: Sequence[Configuration], compiled: Configuration | None) -> dict[str, list[float]]:
        """Milliseconds per variant of diffusers and of each finalist in each round; the ways take turns."""
        timed = self.requests[: self.args.timed]
        theirs = load(self.model, torch.float32, self.args.device)
        ways: dict[str, Callable[[], object]] = {"diffusers": lambda: run_diffusers(theirs, timed, self.args.batch_size)}
        for configuration in finalists:
            ways[str(configuration)] = partial(run, self.engine(configuration), timed)
        if compiled is not None:
            ways[f"{compiled} compiled"] = partial(run, self.engine(compiled, compiled=True), timed)
        for way in ways.values():
            way()  # warms up, and compiles
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.args.rounds):
            for name in list(ways) if number % 2 == 0 else reversed(ways):
                began = time.perf_counter()
                ways[name]()
                if self.args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                found[name].append(1000 * (time.perf_counter() - began) / len(timed))
        return found

    def faster_dtype(self, dtypes: Sequence[str]) -> str:
        """The data type in which one batch is made sooner."""
        times: dict[str, float] = {}
        for dtype in dtypes:
            engine = self.engine(Configuration("dpmsolver++", 4, exact=True, dtype=dtype))
            for _ in range(2):  # the first time warms up
                began = time.perf_counter()
                run(engine, self.requests[: self.args.batch_size])
                times[dtype] = time.perf_counter() - began
        return min(times, key=lambda dtype: times[dtype])


def run(engine: NativeEngine, requests: Sequence[GenerationRequest]) -> list[Tensor]:
    """The engine's pictures, with all texts encoded anew."""
    engine.forget_prompts()
    images = []
    for result in engine.run(requests):
        if isinstance(result, Exception):
            raise result
        images.append(result)
    return images


def run_diffusers(pipeline: Any, requests: Sequence[GenerationRequest], batch_size: int) -> None:
    """The reference's way: whole batches, which share one strength; here, the mean of those asked for."""
    strength = sum(r.strength for r in requests) / len(requests)
    for start in range(0, len(requests), batch_size):
        group = requests[start : start + batch_size]
        pipeline(
            prompt=[r.prompt for r in group],
            image=torch.stack([r.image for r in group]).float() / 255,
            strength=strength,
            guidance_scale=group[0].guidance_scale,
            num_inference_steps=REFERENCE.steps,
            generator=[torch.Generator().manual_seed(r.seed) for r in group],
            output_type="np",
        )


def weights_digest(model: str) -> str:
    """Short hash of a local model's weights, or the id of a remote one."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def conclude(
    search: Search, screened: Sequence[Configuration], finalists: Sequence[Configuration], times: dict[str, list[float]]
) -> dict[str, Any]:
    """All rows, the finalists' with their own timing, and the winner with what it gains over diffusers."""
    rows = [search.row(REFERENCE), *(search.row(configuration) for configuration in screened)]
    for row in rows:
        row["final"] = row["name"] in times
        if row["final"]:
            row["ms"] = median(times[row["name"]])
            row["speedup"] = median(a / b for a, b in zip(times["diffusers"], times[row["name"]], strict=True))
    equal = [row for row in rows[1:] if row["final"] and may_be_equal(row)]
    winner = min(equal, key=lambda row: row["ms"], default=None)
    compiled = {name: median(values) for name, values in times.items() if name.endswith(" compiled")}
    return {
        "diffusers_ms": median(times["diffusers"]),
        "winner": winner,
        "compiled_ms": compiled,
        "rows": [rows[0], *sorted(rows[1:], key=lambda row: row["ms"])],
    }


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table; those that were only screened have no speed-up."""
    lines = [
        "| configuration | ms per variant | times as fast as diffusers | UNet rows | agreement | diversity | images |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| diffusers, batches, DDIM 20 float32 | {result['diffusers_ms']:.1f} | 1 | as below | as below | as below | |",
    ]
    for row in result["rows"]:
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
        errors = [f" ({row[f'{n}_difference']:+.1f} +- {row[f'{n}_error']:.1f})" for n in ("agreement", "diversity")]
        if row["name"] == str(REFERENCE):
            errors = ["", ""]
        mark = " **winner**" if result["winner"] and row["name"] == result["winner"]["name"] else ""
        quality = f"{row['agreement']:.1f}{errors[0]} | {row['diversity']:.1f}{errors[1]} | {row['images']}"
        lines.append(f"| {row['name']}{mark} | {row['ms']:.1f} | {speedup} | {row['unet_rows']:.1f} | {quality} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Agreement and diversity beside the reference over time, with the band that counts as equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    # Differences, as rows were measured on different numbers of images, each beside the reference on the same ones.
    for axes, name in zip(figure.subplots(1, 2), ("agreement", "diversity"), strict=True):
        axes.axhspan(-MARGIN, MARGIN, color="0.9", label="within a point of the reference")
        axes.plot(result["diffusers_ms"], 0, "k*", markersize=12, label="diffusers, DDIM 20, float32")
        for sampler, marker in (("dpmsolver++", "o"), ("ddim", "s"), ("euler", "^"), ("lcm", "D")):
            rows = [row for row in result["rows"][1:] if row["sampler"] == sampler]
            axes.plot(
                [row["ms"] for row in rows], [row[f"{name}_difference"] for row in rows], marker, alpha=0.7, label=sampler
            )
        if winner := result["winner"]:
            at = winner["ms"], winner[f"{name}_difference"]
            axes.plot(*at, "o", markersize=14, fillstyle="none", color="red", label=winner["name"])
        axes.set(xlabel="milliseconds per variant", ylabel=f"{name}, difference (points)", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def recipe_fields(winner: dict[str, Any]) -> dict[str, Any]:
    """What the winner sets in a recipe, by field."""
    return {
        "sampler": winner["sampler"],
        "num_inference_steps": winner["steps"],
        "guidance_interval": tuple(winner["interval"]),
        "exact_strength": winner["exact"],
    }


def load_judge(path: Path) -> Judge:
    """The judge of tools/train_tiny, from the safetensors file that its export writes."""
    from safetensors.torch import load_file

    import classifier

    model = classifier.Classifier()
    model.load_state_dict(load_file(path))
    return Judge(model.requires_grad_(False).to(memory_format=torch.channels_last), classifier.normalize)


def load_images(folder: Path, split: str, count: int) -> Any:
    """``count`` images of a split; splits are sorted by class, and a fixed shuffle makes any number of them a fair sample."""
    from data import load_split

    data = load_split(folder, split)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return type(data)(data.images[order], data.labels[order], [data.subnames[i] for i in order], [data.names[i] for i in order])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "cifar10", help="folder of CIFAR-10")
    parser.add_argument("--split", default="fewshot", help="images to vary; none that the generator was trained on")
    parser.add_argument("--judge", type=Path, default=TOOLS / "judge.safetensors", help="weights of the judge")
    parser.add_argument("--images", type=int, default=200, help="images on which all configurations are screened")
    parser.add_argument("--final", type=int, default=600, help="images on which the finalists are measured")
    parser.add_argument("--finalists", type=int, default=5)
    parser.add_argument("--timed", type=int, default=64, help="variants in a timed run")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--strengths", type=float, nargs=2, default=(0.9, 1.0), help="range, as the preset of tiny has it")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--only", help="screen only configurations whose name contains this text")
    parser.add_argument("--compile", action="store_true", help="also time the best finalist compiled (needs a C++ compiler)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    parser.add_argument("--out", type=Path, required=True, help="folder for quality_speed.json, .md and .png")
    args = parser.parse_args(arguments)
    for path, option in ((args.data, "--data"), (args.judge, "--judge")):
        if not path.exists():
            parser.error(f"{path} does not exist; give {option}")
    if args.threads:
        torch.set_num_threads(args.threads)

    began = time.perf_counter()
    args.final = max(args.final, args.images)
    data = load_images(args.data, args.split, args.final)
    settings = {
        "weights": weights_digest(args.model),
        "judge": hashlib.sha256(args.judge.read_bytes()).hexdigest()[:12],
        "split": args.split,
        "guidance": args.guidance,
        "strengths": list(args.strengths),
        "batch_size": args.batch_size,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "quality_speed.json"
    kept: dict[str, Measured] = {}
    if file.exists():
        earlier = json.loads(file.read_text())
        if earlier["settings"] == settings:
            kept = {name: Measured(**values) for name, values in earlier["measured"].items()}
    search = Search(args.model, data, load_judge(args.judge), args, kept)

    def save(result: dict[str, Any] | None = None) -> None:
        measured = {name: asdict(values) for name, values in search.measured.items()}
        elapsed = round(time.perf_counter() - began, 1)
        file.write_text(json.dumps({"settings": settings, "elapsed_s": elapsed, "result": result, "measured": measured}) + "\n")

    strengths = (args.strengths[0], args.strengths[1])
    dtype = search.faster_dtype(args.dtypes)
    search.measure(REFERENCE, args.images)
    space = [c for c in search_space(dtype) if runs_all(c, strengths) and (not args.only or args.only in str(c))]
    for configuration in space:
        search.measure(configuration, args.images)
        save()
        row = search.row(configuration)
        print(
            f"{row['name']:44} {row['ms']:7.2f} ms"
            f"  agreement {row['agreement_difference']:+6.2f} +- {row['agreement_error']:.2f}"
            f"  diversity {row['diversity_difference']:+6.2f} +- {row['diversity_error']:.2f}",
            flush=True,
        )
    hopeful = sorted((c for c in space if may_be_equal(search.row(c), errors=1.0)), key=lambda c: search.row(c)["ms"])
    finalists = hopeful[: args.finalists]
    for configuration in (REFERENCE, *finalists):
        search.measure(configuration, args.final)
        save()
    equal = [c for c in finalists if may_be_equal(search.row(c))]
    if equal and len(args.dtypes) > 1:  # what the data type alone does, to time and to quality
        other = [replace(equal[0], dtype=name) for name in args.dtypes if name != dtype]
        for configuration in other:
            search.measure(configuration, args.final)
        space, finalists = space + other, finalists + other
    times = search.time_all(finalists, equal[0] if equal and args.compile else None)
    result = conclude(search, space, finalists, times)
    save(result)
    table = markdown(result)
    (args.out / "quality_speed.md").write_text(table)
    plot(result, args.out / "quality_speed.png")
    print(f"\n{table}\n{time.perf_counter() - began:.0f} s in all")
    if result["winner"] is None:
        print("no configuration equals the reference", file=sys.stderr)
        return 1
    winner = result["winner"]
    print(
        f"winner: {winner['name']}, {winner['speedup']:.2f} times as fast as diffusers; a recipe sets {recipe_fields(winner)}"
    )
    for name, ms in result["compiled_ms"].items():
        print(f"{name}: {ms:.2f} ms per variant")
    return 0


if __name__ == "__main__":
    sys.exit(main())
