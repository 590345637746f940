"""Classification accuracy with classic augmentations, with generated variants, and with both, at equal optimiser steps.

    python benchmarks/accuracy.py --data FOLDER --out runs --n 50 100 --seeds 0 1 2 --methods classic generated combined
    python benchmarks/accuracy.py --data CIFAR100 --root data --download --n full --model resnet50 --size 224 --device cuda \\
        --generator stabilityai/sd-turbo --strength 0.3 0.8 --guidance 0 0

``--data`` is a torchvision name, a folder with ``train`` and ``test`` folders of class folders, or one with
``fewshot.parquet`` (learned from) and ``test.parquet`` (measured on). Every run sees the same images in the same order and
takes as many steps, whatever the method; its seed draws the images, the weights and all random choices, so that methods
are compared seed by seed. Captions and variants are made once for each seed and number of images, from those images alone.

Nothing is chosen by looking at the test images: ``--measure rest`` measures on the training images that were not drawn, and
is the way to choose settings. Finished runs are rows of ``OUT/runs.csv``; a second call skips them, and one that was killed
goes on. ``OUT/summary.md`` and ``OUT/summary.png`` have means, 95 % intervals, and differences paired by seed. With ``--judge``
``OUT/views.csv`` says how many variants keep their label, and how much they differ, beside RandAugment's pictures.

Methods: none autoaugment randaugment trivialaugment augmix randomerasing mixup cutmix real-guidance sgid, sgid+CLASSIC, and
sgid with options: sgid:k=4,p=0.3,strength=0.2-0.5,prompt=label|caption|both,context=own|class|dataset,
guidance=similarity|reverse|fixed|3-5,measure=prompt|label,varies=guidance|strength,filter=none|argmax|0.8.
Groups: classic generated combined ablations.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from classification.batches import Batches, channel_statistics
from classification.data import Labelled, Pool, Task, choose, load_task
from classification.generated import Subset
from classification.judging import judge_views, load_judge, randaugment_views
from classification.methods import Method, Variants, expand, filter_name, parse_method
from classification.results import Rows, digest
from classification.summary import markdown, plot, views_markdown
from classification.training import Training, accuracy, train

from sgid_transforms.building.address import Address

FIELDS = (
    "run", "data", "n", "seed", "method", "model", "steps", "batch_size", "measured_on", "images", "accuracy", "replaced",
    "recipe", "p", "k", "rejected", "seconds", "threads", "device", "torch",
)  # fmt: skip
VIEW_FIELDS = (
    "views", "data", "n", "seed", "method", "recipe", "judge", "originals", "each", "agreement_originals", "agreement_variants",
    "distance_variants", "distance_randaugment", "vendi_originals", "vendi_variants", "vendi_randaugment",
)  # fmt: skip


DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Experiment:
    """What all runs of a call have in common; picklable, so that other processes can do some of them."""

    data: str
    root: str
    download: bool
    out: Path
    measure: str
    training: Training
    generator: str
    generator_dtype: str
    captioner: str
    scorer: str
    recipe_settings: tuple[tuple[str, Any], ...]
    device: str
    workers: int
    threads: int
    judge: str | None
    judged: int


@dataclass(frozen=True)
class Run:
    """One row."""

    n: int | None
    seed: int
    method: Method

    @property
    def size(self) -> str:
        return "full" if self.n is None else str(self.n)


def run_name(experiment: Experiment, run: Run) -> str:
    """Digest of all that decides a run's result."""
    variants = run.method.variants
    return digest(
        {
            "data": experiment.data,
            "n": run.size,
            "seed": run.seed,
            "classic": run.method.classic,
            "variants": None if variants is None else [variants_id(experiment, run), variants.p, variants.k],
            "training": asdict(experiment.training),
            "measure": experiment.measure,
        }
    )


def recipe_of(experiment: Experiment, run: Run) -> Any:
    """The recipe of a run's variants. The seed is part of it: seeds share no variant."""
    assert run.method.variants is not None
    return run.method.variants.recipe(experiment.generator, run.seed, **dict(experiment.recipe_settings))


def variants_id(experiment: Experiment, run: Run) -> str:
    """What tells a run's variants from others of the same images."""
    return f"{recipe_of(experiment, run).fingerprint} {outside_recipe(experiment, run)}"


def outside_recipe(experiment: Experiment, run: Run) -> str:
    """What changes pixels and is no part of a recipe: each has stores of its own."""
    models, variants = (experiment.captioner, experiment.scorer), run.method.variants
    name = experiment.generator_dtype + ("" if models == ("auto", "auto") else f"-{digest({'models': models})}")
    if variants is None:
        return name
    by_label = "-label" if variants.measure == "label" else ""
    return name + by_label + ("" if variants.ranked_scale is None else f"-strength-{variants.ranked_scale:g}")


@cache
def task_of(data: str, root: str, download: bool) -> Task:
    """The data, read once in each process."""
    return load_task(data, root, download=download)


def subset_of(experiment: Experiment, run: Run, pool: Pool, indices: list[int]) -> Subset:
    name = f"{Path(experiment.data).name}-n{run.size}-s{run.seed}-{outside_recipe(experiment, run)}"
    variants = run.method.variants
    assert variants is not None
    return Subset(
        experiment.out / "subsets" / name,
        Labelled(pool, indices),
        device=experiment.device,
        dtype=DTYPES[experiment.generator_dtype],
        captioner=experiment.captioner,
        scorer=experiment.scorer,
        measure=variants.measure,
        guidance=variants.ranked_scale,
    )


def measured_on(experiment: Experiment, task: Task, indices: list[int]) -> tuple[Pool, list[int]]:
    """The images that accuracy is measured on."""
    if experiment.measure == "test":
        return task.test, list(range(len(task.test)))
    drawn = set(indices)
    rest = [index for index in range(len(task.train)) if index not in drawn]
    if not rest:
        raise SystemExit("--measure rest needs images that are not trained on; give a smaller --n")
    return task.train, rest


def do_run(experiment: Experiment, run: Run) -> dict[str, Any]:
    """Train and measure; the variants must be there."""
    started = time.perf_counter()
    training, method, device = experiment.training, run.method, experiment.device
    task = task_of(experiment.data, experiment.root, experiment.download)
    indices = choose(task.train.labels, run.n, run.seed)
    mean, std = channel_statistics(task.train, indices, training.size)
    sgid, rejected, recipe = None, 0, None
    if method.variants is not None:
        recipe = recipe_of(experiment, run)
        subset = subset_of(experiment, run, task.train, indices)
        sgid = subset.augment(recipe, p=method.variants.p, k=method.variants.k)
        rejected = sum(ref.variant < method.variants.k for ref in subset.variants.iter_failures(recipe))
    batches = Batches(
        task.train, indices, method, sgid,
        batch_size=training.batch_size, steps=training.steps, size=training.size, seed=run.seed, mean=mean, std=std,
    )  # fmt: skip
    name = run_name(experiment, run)
    checkpoint = experiment.out / "running" / f"{name}.pt"
    model = train(training, batches, seed=run.seed, device=device, workers=experiment.workers, checkpoint=checkpoint)
    pool, measured = measured_on(experiment, task, indices)
    result = accuracy(model, training, pool, measured, mean, std, device)
    stats = None if sgid is None else sgid.stats()
    checkpoint.unlink(missing_ok=True)
    return {
        "run": name,
        "data": task.name,
        "n": run.size,
        "seed": run.seed,
        "method": method.name,
        "model": training.model,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "measured_on": experiment.measure,
        "images": len(measured),
        "accuracy": f"{result:.4f}",
        "replaced": "" if stats is None else f"{stats.hits / max(stats.seen, 1):.4f}",
        "recipe": "" if recipe is None else recipe.fingerprint,
        "p": "" if method.variants is None else method.variants.p,
        "k": "" if method.variants is None else method.variants.k,
        "rejected": "" if method.variants is None else rejected,
        "seconds": f"{time.perf_counter() - started:.2f}",
        "threads": torch.get_num_threads(),
        "device": device,
        "torch": torch.__version__,
    }


def make_variants(experiment: Experiment, runs: list[Run]) -> None:
    """Make all variants that the runs of one choice of images need: for each recipe as many as the greediest one asks for."""
    task = task_of(experiment.data, experiment.root, experiment.download)
    first = runs[0]
    subset = subset_of(experiment, first, task.train, choose(task.train.labels, first.n, first.seed))
    wanted: dict[str, tuple[Any, int]] = {}
    for run in runs:
        assert run.method.variants is not None
        recipe = recipe_of(experiment, run)
        k = max(wanted.get(recipe.fingerprint, (recipe, 0))[1], run.method.variants.k)
        wanted[recipe.fingerprint] = (recipe, k)
    for recipe, k in wanted.values():
        started = time.perf_counter()
        made = subset.make(recipe, k)
        spent = time.perf_counter() - started
        print(
            f"n={first.size} seed={first.seed} recipe {recipe.fingerprint}: {made.wanted - made.rejected} variants "
            f"of {made.wanted} ({made.rejected} rejected), {spent:.0f} s",
            flush=True,
        )


def judge_run(experiment: Experiment, run: Run) -> dict[str, Any] | None:
    """Label agreement and diversity of a run's variants; ``None`` if no image has two of them."""
    assert experiment.judge is not None
    assert run.method.variants is not None
    task = task_of(experiment.data, experiment.root, experiment.download)
    indices = choose(task.train.labels, run.n, run.seed)
    subset, recipe = subset_of(experiment, run, task.train, indices), recipe_of(experiment, run)
    sgid, address = subset.augment(recipe, p=1.0, k=run.method.variants.k), Address(recipe, subset.captions)
    originals, labels, variants = [], [], []
    each = min(run.method.variants.k, 4)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(run.seed)).tolist()
    for index in order:
        image, label = subset.images[index]
        record, numbers = subset.captions.get(sgid.key_of(image)), range(run.method.variants.k)
        found = [subset.variants.get_image(recipe, address.key(record, number), number) for number in numbers]
        made = [picture for picture in found if picture is not None]
        if len(made) >= each and len(originals) < experiment.judged:  # of rejected ones there is nothing to judge
            originals.append(image)
            labels.append(label)
            variants.append(made[:each])
    if each < 2 or not originals:
        return None
    judge = load_judge(experiment.judge, task.train.classes)
    plain = judge_views(judge, [[image] for image in originals], labels)
    generated = judge_views(judge, variants, labels)
    classic = judge_views(judge, randaugment_views(originals, each, run.seed), labels)
    return {
        "views": view_name(experiment, run),
        "data": task.name,
        "n": run.size,
        "seed": run.seed,
        "method": run.method.name,
        "recipe": recipe.fingerprint,
        "judge": Path(experiment.judge).name,
        "originals": len(originals),
        "each": each,
        "agreement_originals": f"{plain.agreement:.4f}",
        "agreement_variants": f"{generated.agreement:.4f}",
        "distance_variants": f"{generated.distance:.4f}",
        "distance_randaugment": f"{classic.distance:.4f}",
        "vendi_originals": f"{plain.vendi:.3f}",
        "vendi_variants": f"{generated.vendi:.3f}",
        "vendi_randaugment": f"{classic.vendi:.3f}",
    }


def view_name(experiment: Experiment, run: Run) -> str:
    assert run.method.variants is not None
    variants = variants_id(experiment, run)
    return digest(
        {"data": experiment.data, "n": run.size, "seed": run.seed, "variants": variants, "k": run.method.variants.k}
        | {"judge": experiment.judge, "judged": experiment.judged}
    )


def in_processes(jobs: int, threads: int, calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Iterable[Any]:
    """Results of calls as they come, from this process or from ``jobs`` others."""
    if jobs == 1:
        for function, arguments in calls:
            yield function(*arguments)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    """A killed benchmark takes its workers along, which would otherwise finish their runs for nobody, beside the next call."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(experiment: Experiment, runs: list[Run], jobs: int) -> tuple[int, int]:
    """Do the runs that have no row yet; how many were done, and how many were there already."""
    rows, views = Rows(experiment.out / "runs.csv", FIELDS), Rows(experiment.out / "views.csv", VIEW_FIELDS)
    known = rows.names()
    names = {run_name(experiment, run): run for run in runs}
    todo = [run for name, run in names.items() if name not in known]
    to_judge = {}
    if experiment.judge is not None:
        seen = views.names()
        candidates = {view_name(experiment, run): run for run in runs if run.method.variants is not None}
        to_judge = {name: run for name, run in candidates.items() if name not in seen}
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in [*todo, *to_judge.values()]:
        if run.method.variants is not None:
            groups.setdefault((run.size, run.seed, outside_recipe(experiment, run)), []).append(run)
    for _ in in_processes(jobs, experiment.threads, [(make_variants, (experiment, group)) for group in groups.values()]):
        pass
    for row in in_processes(jobs, experiment.threads, [(judge_run, (experiment, run)) for run in to_judge.values()]):
        if row is not None:
            views.append(row)
            print(
                f"n={row['n']} seed={row['seed']} {row['method']}: label kept {row['agreement_variants']} of variants, "
                f"{row['agreement_originals']} of originals; distance {row['distance_variants']}, "
                f"RandAugment's {row['distance_randaugment']}",
                flush=True,
            )
    for number, row in enumerate(
        in_processes(jobs, experiment.threads, [(do_run, (experiment, run)) for run in todo]), start=1
    ):
        rows.append(row)
        print(
            f"{number}/{len(todo)} n={row['n']} seed={row['seed']} {row['method']}: {float(row['accuracy']):.2f} % "
            f"({row['seconds']} s)",
            flush=True,
        )
    return len(todo), len(names) - len(todo)


def plan(args: argparse.Namespace) -> tuple[Experiment, list[Run]]:
    """What the arguments ask for.

    Raises:
        ValueError: a method is unknown.
    """
    given = {name: tuple(value) for name in ("guidance", "strength") if (value := getattr(args, name)) is not None}
    defaults = replace(Variants.for_model(args.generator), prompt=args.prompt, filter=args.filter, k=args.k, p=args.p, **given)
    methods = [parse_method(name, defaults) for name in expand(args.methods)]
    training = Training(
        args.model, args.pretrained, args.steps, args.batch_size, args.size, args.optimizer, args.lr, args.weight_decay,
        args.smoothing, args.dtype,
    )  # fmt: skip
    settings = {"num_inference_steps": args.generator_steps, "sampler": args.sampler, "resolution": args.resolution}
    experiment = Experiment(
        data=args.data,
        root=args.root,
        download=args.download,
        out=args.out,
        measure=args.measure,
        training=training,
        generator=args.generator,
        generator_dtype=args.generator_dtype,
        captioner=args.captioner,
        scorer=args.scorer,
        recipe_settings=tuple((name, value) for name, value in settings.items() if value is not None),
        device=args.device,
        workers=args.workers,
        threads=args.threads or max(torch.get_num_threads() // args.jobs, 1),
        judge=args.judge,
        judged=args.judged,
    )
    return experiment, [Run(n, seed, method) for n in args.n for seed in args.seeds for method in methods]


def rows_of(file: Rows, names: set[str]) -> list[dict[str, str]]:
    """The rows of these names, by number of images and by seed."""
    rows = [row for row in file.read() if row[file.fields[0]] in names]
    return sorted(rows, key=lambda row: (math.inf if row["n"] == "full" else int(row["n"]), int(row["seed"])))


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        experiment, runs = plan(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    started = time.perf_counter()
    done, skipped = run_all(experiment, runs, args.jobs)
    print(f"{done} runs done, {skipped} were there already, {time.perf_counter() - started:.0f} s")
    rows = rows_of(Rows(args.out / "runs.csv", FIELDS), {run_name(experiment, run) for run in runs})
    text = markdown(rows)
    if experiment.judge is not None:
        judged = {view_name(experiment, run) for run in runs if run.method.variants is not None}
        if views := rows_of(Rows(args.out / "views.csv", VIEW_FIELDS), judged):
            text += "\n" + views_markdown(views)
    (args.out / "summary.md").write_text(text)
    plot(rows, args.out / "summary.png")
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="torchvision name or folder")
    add("--root", default="data", help="where torchvision's data sets are")
    add("--download", action="store_true", help="let torchvision download the data set")
    add("--out", type=Path, required=True, help="folder for results, captions and variants")
    add("--n", nargs="+", type=_images_per_class, default=[50, 100], help="images per class, or full")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--methods", nargs="+", default=["classic", "generated"])
    add("--measure", choices=("test", "rest"), default="test", help="rest: training images that were not drawn")
    add("--judge", help="safetensors of tools/train_tiny/classifier.py, or clip:MODEL")
    add("--judged", type=int, default=500, help="originals whose variants are judged")

    group = parser.add_argument_group("training")
    add = group.add_argument
    default = Training()
    add("--model", default=default.model, help="small-resnet, a torchvision name, or timm/NAME")
    add("--pretrained", action="store_true")
    add("--steps", type=int, default=default.steps)
    add("--batch-size", type=int, default=default.batch_size)
    add("--size", type=int, default=default.size, help="side of the model's input, in pixels")
    add("--optimizer", choices=("sgd", "adamw"), default=default.optimizer)
    add("--lr", type=float, default=default.lr)
    add("--weight-decay", type=float, default=default.weight_decay)
    add("--smoothing", type=float, default=default.smoothing)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=default.dtype)
    add("--device", default="cpu")
    add("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    add("--threads", type=int, default=0, help="torch threads of each; 0: torch's own choice, divided among the jobs")
    add("--workers", type=int, default=0, help="processes of each run that make batches")

    group = parser.add_argument_group("variants")
    add = group.add_argument
    variants = Variants.for_model("tiny")
    add("--generator", default="tiny", help="tiny, or a diffusers checkpoint")
    add("--generator-dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, half precision on a GPU")
    add("--captioner", default="auto", help="auto: bundled for tiny, else BLIP; or an id or a folder")
    add("--scorer", default="auto", help="CLIP for similarity and filter; auto: bundled for tiny, else OpenAI's B/32")
    add("--generator-steps", type=int, help="num_inference_steps of the recipe; default: the model's preset")
    add("--sampler", help="default: the model's preset")
    add("--resolution", type=int, help="default: the model's preset")
    add("--prompt", choices=("both", "label", "caption"), default=variants.prompt)
    add("--guidance", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: the model's preset")
    add("--strength", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: the model's preset")
    add("--filter", type=filter_name, default=variants.filter, help="none, argmax, or CLIP's least probability of the label")
    add("--k", type=int, default=variants.k, help="variants per image")
    add("--p", type=float, default=variants.p, help="probability that an image is replaced")
    return parser


def _images_per_class(text: str) -> int | None:
    return None if text == "full" else int(text)


if __name__ == "__main__":
    main()
