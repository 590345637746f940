"""Time to quality: milliseconds per variant against label agreement and diversity, over samplers, steps and guidance.

    python benchmarks/quality_speed.py --data FOLDER --judge-work FOLDER --json curve.json

Every configuration makes the same variants (same images, prompts, strengths and seeds). For each, the script measures

  agreement  share of variants whose class, according to an independent judge, is the label of their image, in points
  diversity  mean distance between two variants of one image, 100 * (1 - cosine) of the judge's features, in points
  change     the same distance between a variant and its image
  ms         milliseconds per variant, texts, encoder and decoder included: the best of several timed runs of one batch

and compares with a reference: diffusers' own pipeline in whole batches, DDIM, 20 steps, fp32, guidance everywhere. The winner
is the fastest configuration whose agreement and diversity are at most one point below the reference's. Results are kept
in the JSON file after each configuration, and those that it already holds for the same weights are not measured again;
``--retime`` times the best of them once more, for a machine that was busy during the search.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from generator import DTYPES, TINY, load
from torch import Tensor, nn
from torch.nn import functional as F

from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.generation.requests import GenerationRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "train_tiny"))

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


def judge_variants(judge: Judge, variants: Tensor, originals: Tensor, labels: Tensor) -> dict[str, float]:
    """Agreement, diversity and change, in points, of variants ``(N * VARIANTS, 3, H, W)`` of ``N`` images."""
    classes, features = judge(variants)
    _, original = judge(originals)
    features = features.unflatten(0, (-1, VARIANTS))
    pairs = [1 - (features[:, a] * features[:, b]).sum(-1) for a, b in itertools.combinations(range(VARIANTS), 2)]
    return {
        "agreement": 100 * (classes == labels.repeat_interleave(VARIANTS)).float().mean().item(),
        "diversity": 100 * torch.stack(pairs).mean().item(),
        "change": 100 * (1 - (features * original[:, None]).sum(-1)).mean().item(),
    }


def measure_quality(engine: NativeEngine, requests: list[GenerationRequest], data: Any, judge: Judge) -> dict[str, float]:
    """What an engine makes of the requests, judged, and the UNet rows that each takes."""
    variants = []
    for result in engine.run(requests):
        if isinstance(result, Exception):
            raise result
        variants.append(result)
    rows = sum(engine.evaluations(request) for request in requests) / len(requests)
    return judge_variants(judge, torch.stack(variants), data.images, data.labels) | {"rows": rows}


def time_engine(engine: NativeEngine, requests: list[GenerationRequest], rounds: int, device: str) -> float:
    """Best milliseconds per variant, all texts encoded anew."""
    best = math.inf
    for number in range(rounds + 1):  # the first round warms up
        engine.forget_prompts()
        started = time.perf_counter()
        engine.run(requests)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - started)
    return 1000 * best / len(requests)


def run_diffusers(pipeline: Any, requests: list[GenerationRequest], batch_size: int) -> None:
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


def time_diffusers(pipeline: Any, requests: list[GenerationRequest], batch_size: int, rounds: int) -> float:
    """Best milliseconds per variant of diffusers' own batches."""
    best = math.inf
    for number in range(rounds + 1):
        started = time.perf_counter()
        run_diffusers(pipeline, requests, batch_size)
        if number:
            best = min(best, time.perf_counter() - started)
    return 1000 * best / len(requests)


def search_space(dtypes: list[str]) -> list[Configuration]:
    """All configurations, the reference's first.

    Euler's steps in these levels are DDIM's, so that few of them are enough to show it.
    """
    found = [REFERENCE]
    for dtype in dtypes:
        if dtype != "float32":  # what a dtype does to quality does not depend on the number of steps
            found += [Configuration("dpmsolver++", steps, exact=True, dtype=dtype) for steps in (4, 6)]
            continue
        for sampler, steps in itertools.product(("dpmsolver++", "ddim"), (3, 4, 5, 6, 8)):
            intervals = ((0.0, 1.0), (0.25, 1.0), (0.4, 1.0), (0.0, 0.4))
            found += [Configuration(sampler, steps, interval, exact=True) for interval in intervals]
            found.append(Configuration(sampler, steps))
        found += [Configuration("dpmsolver++", 10), Configuration("euler", 6, exact=True), Configuration("euler", 6)]
        # LCM's way of sampling: denoise, then noise again
        found += [Configuration("lcm", steps) for steps in (4, 6, 8)]
    return list(dict.fromkeys(found))


def runs_all(configuration: Configuration, strengths: tuple[float, float]) -> bool:
    """Whether the lowest strength leaves a step."""
    return configuration.exact or int(configuration.steps * strengths[0]) >= 1


def equal_in_quality(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that lose at most `MARGIN` points of agreement and diversity to the reference, the first row; fastest first."""
    first = rows[0]
    good = [
        row
        for row in rows
        if row["agreement"] >= first["agreement"] - MARGIN and row["diversity"] >= first["diversity"] - MARGIN
    ]
    return sorted(good, key=lambda row: row["ms"])


def weights_digest(model: str) -> str:
    """Short hash of a local model's weights, or the id of a remote one."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def print_row(row: dict[str, Any], reference_ms: float) -> None:
    print(
        f"{row['name']:44} {row['ms']:8.2f} ms {reference_ms / row['ms']:6.2f}x  rows {row['rows']:6.2f}  "
        f"agreement {row['agreement']:6.2f}  diversity {row['diversity']:6.2f}  change {row['change']:6.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--data", required=True, help="folder of the data set, as tools/train_tiny/data.py reads it")
    parser.add_argument("--split", default="fewshot", help="images to vary; none that the generator was trained on")
    parser.add_argument("--judge-work", required=True, type=Path, help="folder with the judge's checkpoint")
    parser.add_argument("--judge", default="judge", help="name of that checkpoint")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--timed", type=int, default=64, help="variants in a timed run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--strengths", type=float, nargs=2, default=(0.25, 0.75))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--only", help="measure only configurations whose name contains this text, and the reference")
    parser.add_argument("--retime", type=int, metavar="N", help="only time the reference and the N best rows again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time; a later call goes on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True, help="results, kept after each configuration")
    args = parser.parse_args()

    import classifier
    from data import load_split

    strengths = (args.strengths[0], args.strengths[1])
    data = load_split(args.data, args.split)
    # Splits are sorted by class: a fixed shuffle makes any number of images a fair sample.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: args.images].tolist()
    data = type(data)(data.images[order], data.labels[order], [data.subnames[i] for i in order], [data.names[i] for i in order])
    judge = Judge(classifier.load(args.judge_work, args.judge), classifier.normalize)
    requests = make_requests(data, len(data), args.guidance, strengths)
    timed = requests[: args.timed]

    settings = {
        "weights": weights_digest(args.model),
        "split": args.split,
        "images": args.images,
        "guidance": args.guidance,
        "strengths": strengths,
        "batch_size": args.batch_size,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows: dict[str, dict[str, Any]] = {}
    if args.json.exists():
        earlier = json.loads(args.json.read_text())
        if earlier["settings"] == json.loads(json.dumps(settings)):
            rows = {row["name"]: row for row in earlier["rows"]}

    configurations = [c for c in search_space(args.dtypes) if runs_all(c, strengths)]
    wanted = [c for c in configurations if c == REFERENCE or not args.only or args.only in str(c)]
    if args.retime:
        known = [rows[str(REFERENCE)], *(row for name, row in rows.items() if name != str(REFERENCE))]
        names = {row["name"] for row in equal_in_quality(known)[: args.retime]}
        wanted = [c for c in configurations if c == REFERENCE or str(c) in names]
    deadline = time.monotonic() + 60 * args.minutes
    pipelines: dict[str, Any] = {}
    for configuration in wanted:
        name, dtype = str(configuration), configuration.dtype
        if name in rows and not args.retime:
            print_row(rows[name], rows[str(REFERENCE)]["ms"])
            continue
        if time.monotonic() > deadline:
            break
        if dtype not in pipelines:
            pipelines[dtype] = load(args.model, DTYPES[dtype], args.device)
        engine = NativeEngine(
            pipelines[dtype],
            sampler=configuration.sampler,
            num_inference_steps=configuration.steps,
            guidance_interval=configuration.interval,
            exact_strength=configuration.exact,
            batch_size=args.batch_size,
        )
        if name not in rows:
            rows[name] = {"name": name, **asdict(configuration), **measure_quality(engine, requests, data, judge)}
        rows[name]["engine_ms"] = rows[name]["ms"] = time_engine(engine, timed, args.rounds, args.device)
        if configuration == REFERENCE:  # timed as diffusers runs it: the engine's own pictures are the same ones
            theirs = load(args.model, torch.float32, args.device)
            rows[name]["ms"] = time_diffusers(theirs, timed, args.batch_size, args.rounds)
        args.json.write_text(json.dumps({"settings": settings, "rows": list(rows.values())}, indent=1) + "\n")
        print_row(rows[name], rows[str(REFERENCE)]["ms"])

    reference = rows[str(REFERENCE)]
    best = equal_in_quality([reference, *(row for name, row in rows.items() if name != str(REFERENCE))])
    print("\nreference, then the fastest at equal agreement and diversity:")
    for row in (reference, *best[:5]):
        print_row(row, reference["ms"])


if __name__ == "__main__":
    main()
