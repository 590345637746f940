"""Search for the recipe that suits the user's images, by what its variants do to a sample of them."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sgid_transforms.building.address import Address
from sgid_transforms.building.builder import Generate
from sgid_transforms.bulk import Models, caption_folder, generate_folder
from sgid_transforms.captions.store import CaptionStore
from sgid_transforms.errors import ModelLoadError, RecipeError
from sgid_transforms.files import atomic_write, replacing
from sgid_transforms.generation.generator import Generator
from sgid_transforms.images.folders import KnownImage, Scan
from sgid_transforms.images.keys import to_uint8_chw
from sgid_transforms.images.reading import load_image
from sgid_transforms.models.clip import LABEL_TEMPLATE, CLIPScorer
from sgid_transforms.models.loading import load_pipeline
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.prompts import CAPTION_MODES, parse_template
from sgid_transforms.recipe.recipe import CAPTION_SOURCES, Recipe
from sgid_transforms.report.contact_sheet import contact_sheet
from sgid_transforms.report.metrics import vendi_score
from sgid_transforms.variants.store import VariantStore

STRENGTHS: Final = ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0))
GUIDANCE: Final = (1.5, 7.0, 0.5)  # lowest, highest, step; the bundled model takes scales up to 7
_ALONE: Final = "label alone"  # the prompt has no caption
_ETA: Final = 3  # a third of the recipes goes on, with three times the images
_REPEATS: Final = 20  # the search ends when it proposes nothing new so many times
_SHOWN: Final = 10  # rows of a contact sheet


class Judge(Protocol):
    """Anything that tells which class an image shows; `ImageClassifier` is one."""

    id: str

    def answers(self, images: Sequence[Tensor], /) -> list[str]:
        """A class name for each uint8 image ``(3, H, W)``."""


@dataclass(frozen=True)
class Point:
    """What a recipe does to a sample of images.

    Args:
        recipe: What was generated.
        images: Number of originals.
        agreement: Share of the wanted variants in which the judge sees the label, in [0, 1]; one that the filters rejected
            counts as one that lost it.
        change: Mean distance of a variant and its original, ``1 - cosine`` of CLIP's embeddings, in [0, 2].
        diversity: Effective number of different images among the originals and variants of a class, mean over the classes
            (`vendi_score` of CLIP's embeddings).
        value: The same number without the variants that lost their label.
    """

    recipe: Recipe
    images: int
    agreement: float
    change: float
    diversity: float
    value: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Args:
        chosen: The point with the highest value.
        base: That of the recipe at the start.
        front: Points that no other one beats in both agreement and diversity, by agreement.
        points: All recipes that were tried on the whole sample, in the order of their values, best first.
        tried: Number of recipes that were tried, most of them on a part of the sample.
        agreement_originals: Share of the originals in which the judge sees the label.
        value_originals: Value of the originals alone.
        notes: What could not be tried, and why.
        stopped: Whether it was stopped before its time was up.
    """

    chosen: Point
    base: Point
    front: tuple[Point, ...]
    points: tuple[Point, ...]
    tried: int
    agreement_originals: float
    value_originals: float
    notes: tuple[str, ...]
    stopped: bool

    @property
    def why(self) -> str:
        """The reason for the choice, in one sentence."""
        chosen, base = self.chosen, self.base
        worth = f"the originals of a class are worth {self.value_originals:.1f} different images"
        if chosen.recipe == base.recipe:
            return (
                f"Your recipe stays: {worth}, with its variants they are worth {base.value:.1f}, and with those of none of the "
                f"{self.tried} others more; the judge sees the label in {base.agreement:.0%} of its variants "
                f"({self.agreement_originals:.0%} of the originals)."
            )
        return (
            f"Chosen: {describe(chosen.recipe)}: {worth}, with its variants {chosen.value:.1f}, the most of {self.tried + 1} "
            f"recipes, {len(self.points)} of them tried on the whole sample (yours: {base.value:.1f}); the judge sees the "
            f"label in {chosen.agreement:.0%} of its variants (yours: {base.agreement:.0%}, originals: "
            f"{self.agreement_originals:.0%})."
        )


def describe(recipe: Recipe) -> str:
    """What `tune` varies, in words: ``strength 0.9-1, guidance 2, free captions of other images``."""
    low, high = recipe.strength if isinstance(recipe.strength, tuple) else (recipe.strength, recipe.strength)
    strength = f"{low:g}" if low == high else f"{low:g}-{high:g}"
    scale = recipe.guidance
    guidance = f"{scale.low:g}-{scale.high:g} by similarity" if isinstance(scale, SimilarityGuidance) else f"{scale:g}"
    whose = {"own": "their own images", "class": "other images of the class", "dataset": "other images"}[recipe.caption_from]
    text = f"{recipe.caption_mode} captions of {whose}" if _has_caption(recipe.prompt) else _ALONE
    return f"strength {strength}, guidance {guidance}, {text}"


class _Seen(NamedTuple):
    """An image's embeddings ``(N, D)``, the original's first, and whether the judge sees the label in each."""

    label: str
    features: Tensor
    kept: Tensor


class Tuner:
    """Measures recipes on a sample of a folder's images. What was made once is kept in ``out``, and found again.

    Args:
        scan: The images.
        base: The recipe whose settings are varied; the sample is captioned for it.
        out: Folder for captions, variants and results.
        models: Which models to use; its scorer's embeddings measure change and diversity.
        sample: Number of images, spread evenly over the classes.
        count: Variants per image, at least 2.
        judge: Sees labels; None: the scorer.
        progress: Show progress bars.

    Raises:
        ModelLoadError: A model cannot be loaded.
        RecipeError: A number is too small, or there are fewer than two classes.
    """

    def __init__(
        self,
        scan: Scan,
        base: Recipe,
        out: str | os.PathLike[str],
        models: Models | None = None,
        *,
        sample: int = 200,
        count: int = 4,
        judge: Judge | None = None,
        progress: bool = False,
    ) -> None:
        if count < 2:
            raise RecipeError(f"{count} variants per image have no diversity to measure; make at least 2")
        self.classes = sorted({image.file.label for image in scan.images})
        if len(self.classes) < 2:
            raise RecipeError(f"all images are of one class, {self.classes[0]!r}, so no label can be lost; give at least two")
        self.base, self.out, self.count = base, Path(out), count
        self.out.mkdir(parents=True, exist_ok=True)
        self.scan = replace(scan, images=tuple(itertools.islice(spread(scan.images), sample)))
        self._models = models or Models()
        scorer = self._models.scorer_for(base)
        self._scorer = CLIPScorer(scorer, self._models.device).load() if isinstance(scorer, str) else scorer
        self._judge = judge
        self._progress = progress
        self._pipeline: Any = None
        self._store = VariantStore(self.out / "variants")

    @property
    def judge_id(self) -> str:
        """Name of what sees the labels."""
        return self._scorer.id if self._judge is None else self._judge.id

    def caption(self, recipe: Recipe, stop: Callable[[], bool] = lambda: False) -> bool:
        """Caption the sample as a recipe asks; whether it was done to the end."""
        with closing(CaptionStore(self._captions(recipe))) as captions:
            return not caption_folder(self.scan, recipe, captions, self._models, progress=self._progress, stop=stop).stopped

    def originals(self) -> tuple[float, float]:
        """Share of the originals in which the judge sees the label, and their value."""
        seen = [self._see(image, {}) for image in self.scan.images]
        return _mean([float(one.kept[0]) for one in seen]), _worth(seen)

    def measure(self, recipe: Recipe, images: int, stop: Callable[[], bool] = lambda: False) -> Point | None:
        """Make the variants of the first ``images`` of the sample, and measure them; None if it was stopped.

        Raises:
            GenerationError: The model fails.
            StoreError: A store cannot be read or written.
        """
        scan = replace(self.scan, images=self.scan.images[:images])
        models = replace(self._models, generator=self._generator)
        with closing(CaptionStore(self._captions(recipe))) as captions:
            done = generate_folder(scan, recipe, captions, self._store, count=self.count, models=models, stop=stop)
            if done.stopped:
                return None
            seen = [self._see(image, variants) for image, variants in self._variants(recipe, captions, scan.images)]
        return Point(
            recipe,
            len(seen),
            agreement=sum(int(one.kept[1:].sum()) for one in seen) / (len(seen) * self.count),
            change=_mean([change for one in seen for change in (1 - one.features[1:] @ one.features[0]).tolist()]),
            diversity=_worth(seen),
            value=_worth([_Seen(one.label, one.features[[True, *one.kept[1:].tolist()]], one.kept) for one in seen]),
        )

    def sheet(self, point: Point) -> Image.Image:
        """A contact sheet of some of the sample: originals and their variants."""
        chosen = self.scan.images[:_SHOWN]
        with closing(CaptionStore(self._captions(point.recipe))) as captions:
            rows = [
                [self._original(image), *(found.get(number) for number in range(self.count))]
                for image, found in self._variants(point.recipe, captions, chosen)
            ]
        labels = [image.file.label for image in chosen]
        return contact_sheet(
            rows, row_titles=labels, column_titles=["original", *(f"variant {number}" for number in range(self.count))]
        )

    def _captions(self, recipe: Recipe) -> Path:
        """One store for each kind of text: captions of another mode would replace each other."""
        return self.out / f"captions-{recipe.caption_mode if _has_caption(recipe.prompt) else 'none'}.sqlite"

    def _generator(self, recipe: Recipe, device: str, **options: Any) -> Generate:
        """A generator for any of the recipes, which share one pipeline."""
        if self._models.generator is not None:
            return self._models.generator(recipe, device, **options)
        if self._pipeline is None:
            loading = {"lora": recipe.lora, "lora_scale": recipe.lora_scale}
            self._pipeline = load_pipeline(recipe.model, revision=recipe.revision, device=device, **loading)  # type: ignore[arg-type]
        named = recipe if recipe.revision is not None else recipe.replace(revision="as loaded")
        return Generator.from_recipe(named, device, labels=self.classes, clip=self._scorer, pipeline=self._pipeline, **options)

    def _variants(
        self, recipe: Recipe, captions: CaptionStore, images: Sequence[KnownImage]
    ) -> Iterator[tuple[KnownImage, dict[int, Tensor]]]:
        address = Address(recipe, captions)
        records = captions.get_many([image.key for image in images])
        for image in images:
            found = {}
            if (record := records.get(image.key)) is not None:
                for number in range(self.count):
                    key = address.key(record, number, image.file.label)
                    variant = None if key is None else address.find(self._store, record, key, number, pil=False)
                    if variant is not None:
                        found[number] = variant
            yield image, found

    def _see(self, image: KnownImage, variants: Mapping[int, Tensor]) -> _Seen:
        shown = [self._original(image), *variants.values()]
        features = self._scorer.image_features(shown)
        kept = torch.tensor([answer == image.file.label for answer in self._answers(shown, features)])
        return _Seen(image.file.label, features, kept)

    def _answers(self, images: Sequence[Tensor], features: Tensor) -> list[str]:
        if self._judge is not None:
            return self._judge.answers(images)
        return [self.classes[index] for index in self._scorer.probabilities(features, self.classes).argmax(1).tolist()]

    def _original(self, image: KnownImage) -> Tensor:
        return to_uint8_chw(load_image(image.file.path))


def spread(images: Sequence[KnownImage]) -> Iterator[KnownImage]:
    """The images in an order that depends on their pixels alone, one of each class in turn."""
    by_class: dict[str, list[KnownImage]] = {}
    for image in sorted(images, key=lambda image: image.key):
        by_class.setdefault(image.file.label, []).append(image)
    for row in itertools.zip_longest(*(by_class[label] for label in sorted(by_class))):
        yield from (image for image in row if image is not None)


def tune(
    scan: Scan,
    base: Recipe,
    out: str | os.PathLike[str],
    models: Models | None = None,
    *,
    minutes: float = 20.0,
    sample: int = 200,
    count: int = 4,
    judge: Judge | None = None,
    trials: int | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Tuning | None:
    """Find the recipe whose variants add most to your images without losing their labels.

    Strength, guidance scale, caption mode and the source of captions are varied; all else is as in ``base``. Optuna's
    tree-structured Parzen estimator proposes recipes, and its successive halving tries each on a ninth of the sample, the
    best third of them on a third, and the best third of those on all of it (Li et al. 2020, arXiv 1810.05934). Everything is
    on disk in ``out``; run it again to go on.

    Args:
        scan: The images.
        base: The recipe to start from; it is measured first, on the whole sample.
        out: Folder for ``recipe.toml`` (the choice), ``points.csv``, ``front.png``, contact sheets, captions and variants.
        models: Which models to use.
        minutes: Time for trying recipes; captions and the recipe at the start are not counted.
        sample: Number of images, spread evenly over the classes.
        count: Variants per image.
        judge: Sees labels; None: the scorer of ``models``.
        trials: End after so many recipes, even if there is time left.
        progress: Show progress bars.
        stop: When it returns True, the job ends early, with what is known then.

    Returns:
        None if it was stopped before the recipe at the start was measured.

    Raises:
        ModelLoadError: A model cannot be loaded.
        RecipeError: A number is too small, or there are fewer than two classes.
        GenerationError: The model fails.

    Examples:
        >>> found = tune(scan_folder("train"), Recipe.for_model("tiny"), "tuned", minutes=10)
        >>> sgid = SGIDAugment(recipe="tuned/recipe.toml")
    """
    tuner = Tuner(scan, base, out, models, sample=sample, count=count, judge=judge, progress=progress)
    texts, notes = _texts(tuner, stop)
    first = None if stop() else tuner.measure(base, len(tuner.scan.images), stop)
    if first is None:
        return None
    search = _Search(tuner, texts)
    search.run(minutes, trials, progress, stop)
    points, tried = search.points()
    whole = sorted({first.recipe: first, **points}.values(), key=lambda point: -point.value)
    front = tuple(sorted(_front(whole), key=lambda point: point.agreement))
    chosen = max(whole, key=lambda point: (point.value, point.recipe == base))
    found = Tuning(chosen, first, front, tuple(whole), tried, *tuner.originals(), tuple(notes), stop())
    _write(tuner, found)
    return found


class _Search:
    """Optuna's study: what was tried, and what to try next."""

    def __init__(self, tuner: Tuner, texts: Mapping[str, Mapping[str, str]]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._tuner, self._texts = tuner, texts
        size = len(tuner.scan.images)
        self._rungs = sorted({max(1, size // _ETA**2), max(1, size // _ETA), size})
        self._strengths = {f"{low:g}-{high:g}": (low, high) for low, high in STRENGTHS if _runs(tuner.base, (low, high))}
        guidance = tuner.base.guidance  # a distilled model may know no guidance
        self._guided = isinstance(guidance, SimilarityGuidance) or guidance > 1
        settings = [
            repr(tuner.base),
            sorted(image.key for image in tuner.scan.images),
            tuner.count,
            tuner.judge_id,
            sorted(texts),
        ]
        self._study: Any = optuna.create_study(
            study_name=hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16],
            storage=JournalStorage(JournalFileBackend(str(tuner.out / "study.log"))),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=self._rungs[0], reduction_factor=_ETA),
            direction="maximize",
            load_if_exists=True,
        )
        self._states: Any = optuna.trial.TrialState
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):  # of a process that was killed
            self._later(trial)
        # Another seed than before, or the first proposals after a restart would be the same.
        self._study.sampler = optuna.samplers.TPESampler(seed=tuner.base.seed + len(self._study.get_trials(deepcopy=False)))

    def run(self, minutes: float, trials: int | None, progress: bool, stop: Callable[[], bool]) -> None:
        """Try recipes until the time is up."""
        end = time.monotonic() + 60 * minutes
        repeats = 0

        def over() -> bool:
            return stop() or time.monotonic() >= end

        with tqdm(desc="tuning", unit="img", disable=not progress) as bar:
            while not over() and repeats < _REPEATS:
                tried = self._tried()
                if trials is not None and len(tried) >= trials:
                    return
                trial = self._study.ask()
                recipe = self._recipe(self._propose(trial))
                if recipe in tried or recipe == self._tuner.base:
                    repeats += 1
                    self._study.tell(trial, state=self._states.FAIL)
                    continue
                repeats = 0
                self._try(trial, recipe, over, bar)

    def _later(self, trial: Any) -> None:
        """Let the next call begin with a trial that was not finished: its variants so far are there."""
        self._study.tell(trial.number, state=self._states.FAIL)
        if trial.params:
            self._study.enqueue_trial(trial.params)

    def points(self) -> tuple[dict[Recipe, Point], int]:
        """What is known of the recipes that were tried on the whole sample, and how many were tried at all."""
        tried = self._tried()
        return {recipe: point for recipe, point in tried.items() if point.images == self._rungs[-1]}, len(tried)

    def _try(self, trial: Any, recipe: Recipe, over: Callable[[], bool], bar: Any) -> None:
        before, best = 0, 0.0
        for images in self._rungs:
            point = self._tuner.measure(recipe, images, over)
            if point is None:
                self._later(trial)
                return
            bar.update((images - before) * self._tuner.count)
            before, best = images, point.value
            trial.set_user_attr("point", {name: value for name, value in asdict(point).items() if name != "recipe"})
            trial.report(point.value, images)
            if images < self._rungs[-1] and trial.should_prune():
                self._study.tell(trial, state=self._states.PRUNED)
                return
        self._study.tell(trial, best)
        bar.set_postfix(best=f"{self._study.best_value:.3f}", recipes=len(self._tried()))

    def _tried(self) -> dict[Recipe, Point]:
        found = {}
        for trial in self._study.get_trials(deepcopy=False, states=(self._states.COMPLETE, self._states.PRUNED)):
            recipe = self._recipe(trial.params)
            found[recipe] = Point(recipe, **trial.user_attrs["point"])
        return found

    def _propose(self, trial: Any) -> dict[str, Any]:
        low, high, step = GUIDANCE
        chosen = {"text": trial.suggest_categorical("text", sorted(self._texts))}
        if self._strengths:
            chosen["strength"] = trial.suggest_categorical("strength", sorted(self._strengths))
        if self._guided:
            chosen["guidance"] = trial.suggest_float("guidance", low, high, step=step)
        return chosen

    def _recipe(self, chosen: Mapping[str, Any]) -> Recipe:
        changes: dict[str, Any] = dict(self._texts[chosen["text"]])
        if "strength" in chosen:
            changes["strength"] = self._strengths[chosen["strength"]]
        if "guidance" in chosen:
            changes["guidance"] = chosen["guidance"]
        return self._tuner.base.replace(**changes)


def _texts(tuner: Tuner, stop: Callable[[], bool]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What the prompt may hold, as changes of the recipe; the sample is captioned for each. Also what cannot work, and why."""
    base = tuner.base
    notes: list[str] = []
    alone = {"prompt": LABEL_TEMPLATE if _has_caption(base.prompt) else base.prompt}
    prompt = base.prompt if _has_caption(base.prompt) else Recipe.prompt
    texts = {_ALONE: alone}
    if not tuner.caption(base.replace(**alone), stop):
        return texts, notes
    for mode in CAPTION_MODES:
        try:
            if not tuner.caption(base.replace(prompt=prompt, caption_mode=mode), stop):
                break
        except ModelLoadError as error:
            if mode == base.caption_mode:
                raise
            notes.append(f"captions of mode {mode!r} were left out: {error}")
            continue
        for source in CAPTION_SOURCES:
            texts[f"{mode}, {source}"] = {"prompt": prompt, "caption_mode": mode, "caption_from": source}
    return texts, notes


def _worth(seen: Sequence[_Seen]) -> float:
    """Effective number of different images in a class, mean over the classes."""
    by_label: dict[str, list[Tensor]] = {}
    for one in seen:
        by_label.setdefault(one.label, []).append(one.features)
    return _mean([vendi_score(torch.cat(features)) for features in by_label.values()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _has_caption(prompt: str) -> bool:
    return any(name == "caption" for _, name in parse_template(prompt))


def _runs(base: Recipe, strength: tuple[float, float]) -> bool:
    """Whether the recipe's steps allow a strength: with few steps, a low one would run none."""
    try:
        base.replace(strength=strength)
    except RecipeError:
        return False
    return True


def _front(points: Sequence[Point]) -> Iterator[Point]:
    """Points that no other one beats in one of agreement and diversity while being as good in the other."""
    for one in points:
        if not any(
            (other.agreement, other.diversity) != (one.agreement, one.diversity)
            and other.agreement >= one.agreement
            and other.diversity >= one.diversity
            for other in points
        ):
            yield one


def _write(tuner: Tuner, found: Tuning) -> None:
    out = tuner.out
    for old in out.glob("sheet-*.png"):
        old.unlink()
    shown = sorted({found.chosen, *found.front[:: max(1, len(found.front) // 4)]}, key=lambda point: point.agreement)
    for number, point in enumerate(shown, 1):
        tuner.sheet(point).save(out / f"sheet-{number}{'-chosen' if point == found.chosen else ''}.png")
    _draw(found, shown, out / "front.png")
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["recipe", "images", "agreement", "change", "diversity", "value", "front", "chosen"])
    for point in found.points:
        figures = [f"{value:.4f}" for value in (point.agreement, point.change, point.diversity, point.value)]
        rows.writerow([describe(point.recipe), point.images, *figures, point in found.front, point == found.chosen])
    atomic_write(out / "points.csv", text.getvalue())
    found.chosen.recipe.to_toml(out / "recipe.toml")


def _draw(found: Tuning, shown: Sequence[Point], path: Path) -> None:
    """Agreement and diversity of all points, with the front; points that have a contact sheet get its number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.axvline(100 * found.agreement_originals, color="0.6", linestyle=":", label="the originals' labels")
    cloud = axes.scatter(
        [100 * point.agreement for point in found.points],
        [point.diversity for point in found.points],
        c=[point.change for point in found.points],
        cmap="viridis",
        label="recipe",
    )
    figure.colorbar(cloud, ax=axes, label="change (distance from the original)")
    front = [(100 * point.agreement, point.diversity) for point in found.front]
    axes.step(*zip(*front, strict=True), where="pre", color="0.5", linewidth=1, zorder=0, label="front: no recipe beats these")
    for point, marker, name in ((found.base, "s", "yours"), (found.chosen, "*", "chosen")):
        axes.scatter(
            100 * point.agreement, point.diversity, marker=marker, s=220, facecolors="none", edgecolors="#bf3f0a",
            linewidths=1.6, label=name,
        )  # fmt: skip
    for number, point in enumerate(shown, 1):
        axes.annotate(str(number), (100 * point.agreement, point.diversity), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="variants that show their label, %", ylabel="diversity (different images in a class)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
