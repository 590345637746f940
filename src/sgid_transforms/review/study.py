"""A study with people, as in the SGID paper: does a picture show its label, and how different are two pictures?

Nobody is told where a picture comes from. Originals, RandAugment's pictures and variants are mixed, in another order for each
person.
"""

import hashlib
import math
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2

from sgid_transforms.errors import SGIDError
from sgid_transforms.report.answers import QUESTIONS, Answer, Answers
from sgid_transforms.report.html import encode
from sgid_transforms.report.metrics import Scorer, human_consistency
from sgid_transforms.review.gallery import Gallery, NotFoundError
from sgid_transforms.variants.layout import image_part

RATINGS = ("1", "2", "3", "4", "5")
_SIDE = 320


class Source(NamedTuple):
    """One picture of a trial.

    Args:
        gallery: Number of the recipe, or -1 for an original.
        key: Key of the original, or of the variant in its store.
        number: The variant's number; for RandAugment the seed; None for an original as it is.
    """

    gallery: int
    key: str
    number: int | None


@dataclass(frozen=True)
class Trial:
    """One question, with one picture for ``"class"`` and two for ``"difference"``."""

    id: str
    question: str
    arm: str
    key: str
    label: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Figures:
    """What people said about one arm, and what a scorer says about the same pictures. Unknown figures are None.

    Args:
        arm: ``"originals"``, ``"randaugment"`` or a recipe's fingerprint.
        name: How it is called on the page.
        seen: Answers to "which class is this?".
        consistency: Share of them that are the label, with its 95 % interval.
        rated: Answers to "how different are these two?".
        diversity: Their mean, 1 to 5, with its 95 % interval.
        agreement: Share of the pictures whose likeliest class is the label, by the scorer.
        distance: Mean cosine distance of the two pictures, by the scorer.
    """

    arm: str
    name: str
    seen: int
    consistency: tuple[float, float, float] | None
    rated: int
    diversity: tuple[float, float, float] | None
    agreement: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Results:
    """All results of a study.

    Args:
        people: Their names.
        figures: One for each arm.
        alpha: Krippendorff's alpha between people by question, 1 for perfect agreement and 0 for chance; None where fewer than
            two people answered the same questions, or all gave the same answer.
        correlation: Spearman's correlation, over pictures, of people's mean answers with the scorer's: whether they see the
            label with its probability, and their ratings with the cosine distance.
    """

    people: tuple[str, ...]
    figures: tuple[Figures, ...]
    alpha: dict[str, float | None]
    correlation: dict[str, float | None]


class Study:
    """Trials for some originals, and their answers.

    Args:
        galleries: The variants of each recipe.
        names: What the recipes are called in the results.
        answers: Where the answers are kept.
        images: Originals in the study; each gives two questions for each arm.
        scorer: For the automatic metrics beside people's answers; None: they are left out.
    """

    def __init__(
        self,
        galleries: Sequence[Gallery],
        names: Sequence[str],
        answers: Answers,
        images: int = 12,
        scorer: Scorer | None = None,
    ) -> None:
        self.galleries, self.answers, self.scorer = list(galleries), answers, scorer
        fingerprints = [gallery.recipe.fingerprint for gallery in galleries]
        self.names = {"originals": "originals", "randaugment": "RandAugment"} | dict(zip(fingerprints, names, strict=True))
        self._images = images
        self._lock = threading.Lock()
        self._trials: dict[str, Trial] | None = None
        self._blind = secrets.token_hex(16)  # picture addresses tell nothing, and nobody can guess others
        self._measured: dict[Source, torch.Tensor] = {}

    @property
    def labels(self) -> list[str]:
        """The classes to choose from."""
        return self.galleries[0].labels

    def trials(self) -> dict[str, Trial]:
        """All trials by id; the same for the same stores."""
        with self._lock:
            if self._trials is None:
                self._trials = {trial.id: trial for trial in self._plan()}
            return self._trials

    def next(self, who: str) -> dict[str, Any]:
        """The next question for a person: without its answer, and without a hint of where its pictures come from."""
        trials = self.trials()
        done = {answer.trial for answer in self.answers.all() if answer.who == who}
        order = sorted(trials, key=lambda name: _hash(who, name))
        left = [name for name in order if name not in done]
        status = {"done": len(order) - len(left), "total": len(order)}
        if not left:
            return status | {"trial": None}
        trial = trials[left[0]]
        pictures = [f"/study/picture/{self._token(trial.id, number)}" for number in range(len(trial.sources))]
        choices = self.labels if trial.question == "class" else list(RATINGS)
        return status | {"trial": trial.id, "question": trial.question, "pictures": pictures, "choices": choices}

    def answer(self, who: str, trial: str, answer: str) -> None:
        """Keep a person's answer.

        Raises:
            NotFoundError: There is no such trial, or the answer is none of its choices.
        """
        known = self.trials().get(trial)
        if known is None or answer not in (self.labels if known.question == "class" else RATINGS):
            raise NotFoundError("this question has changed; reload the page")
        self.answers.add(Answer(trial, who, known.question, known.arm, known.key, known.label, answer, time.time()))

    def picture(self, token: str) -> tuple[bytes, str]:
        """File and media type of a picture, by the address that `next` gave.

        Raises:
            NotFoundError: There is no such picture.
        """
        for trial in self.trials().values():
            for number, source in enumerate(trial.sources):
                if secrets.compare_digest(self._token(trial.id, number), token):
                    return encode(self._load(source), _SIDE)[:2]
        raise NotFoundError("there is no such picture")

    def results(self) -> Results:
        """What was answered so far."""
        import krippendorff

        answers = self.answers.all()
        arms = [arm for arm in self.names if arm in {answer.arm for answer in answers}]
        alpha = {}
        for question, level in zip(QUESTIONS, ("nominal", "ordinal"), strict=True):
            table = _table([answer for answer in answers if answer.question == question], self.labels)
            several = (
                table is not None and (np.isfinite(table).sum(0) > 1).any() and len(np.unique(table[np.isfinite(table)])) > 1
            )
            alpha[question] = float(krippendorff.alpha(table, level_of_measurement=level)) if several else None
        human, machine = self._by_trial(answers)
        correlation = {question: _spearman(human[question], machine[question]) for question in QUESTIONS}
        figures = [self._figures(arm, [answer for answer in answers if answer.arm == arm], machine) for arm in arms]
        return Results(tuple(sorted({answer.who for answer in answers})), tuple(figures), alpha, correlation)

    def _plan(self) -> list[Trial]:
        first = self.galleries[0]
        keys = sorted(first.select(), key=lambda key: _hash("study", key))
        by_label: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            by_label[first.record(key).label or ""].append(key)
        # Classes in turn, so that a small study sees many of them.
        turns = [
            key
            for row in zip(*(_padded(one, max(map(len, by_label.values()))) for one in by_label.values()), strict=True)
            for key in row
            if key
        ]
        chosen: list[Trial] = []
        images = 0
        for key in turns:
            if images >= self._images:
                break
            trials = self._trials_of(key, by_label)
            images += bool(trials)
            chosen += trials
        return chosen

    def _trials_of(self, key: str, by_label: dict[str, list[str]]) -> list[Trial]:
        """The trials of one original; none if an arm lacks pictures, since arms are compared on the same originals."""
        record = self.galleries[0].record(key)
        label = record.label or ""
        try:
            self.galleries[0].original(key)
        except NotFoundError:
            return []
        others = [other for other in by_label[label] if other != key]
        if not label or not others:
            return []
        pairs = {
            "originals": (Source(-1, key, None), Source(-1, others[_hash("pair", key)[0] % len(others)], None)),
            "randaugment": (Source(-1, key, _seed(key, 0)), Source(-1, key, _seed(key, 1))),
        }
        for number, gallery in enumerate(self.galleries):
            rejected = gallery.variants.rejections(gallery.recipe).get(image_part(key), frozenset())
            refs = [ref for ref in gallery.current(gallery.record(key)) if (ref.key, ref.variant) not in rejected]
            refs.sort(key=lambda ref: _hash("variant", ref.key, str(ref.variant)))
            if len(refs) < 2:
                return []
            pairs[gallery.recipe.fingerprint] = tuple(Source(number, ref.key, ref.variant) for ref in refs[:2])  # type: ignore[assignment]
        return [
            Trial(
                _hash(arm, question, key, repr(pair)).hex()[:24],
                question,
                arm,
                key,
                label,
                pair[: 1 + (question == "difference")],
            )
            for arm, pair in pairs.items()
            for question in QUESTIONS
        ]

    def _token(self, trial: str, number: int) -> str:
        return _hash(self._blind, trial, str(number)).hex()[:32]

    def _load(self, source: Source) -> torch.Tensor:
        if source.gallery >= 0:
            gallery = self.galleries[source.gallery]
            image = gallery.variants.get_image(gallery.recipe, source.key, source.number or 0)
            if image is None:
                raise NotFoundError("there is no such variant")
            return image
        image = self.galleries[0].original(source.key)
        if source.number is None:
            return image
        with self._lock, torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.number)
            augmented: torch.Tensor = v2.RandAugment()(image)
        return augmented

    def _by_trial(self, answers: Sequence[Answer]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """People's mean answer to each trial, and what the scorer says about its pictures, by question and trial."""
        given: dict[str, dict[str, list[float]]] = {question: defaultdict(list) for question in QUESTIONS}
        for answer in answers:
            given[answer.question][answer.trial].append(answer.is_right if answer.question == "class" else float(answer.answer))
        human = {question: {name: sum(all_) / len(all_) for name, all_ in given[question].items()} for question in QUESTIONS}
        machine: dict[str, dict[str, float]] = {question: {} for question in QUESTIONS}
        if self.scorer is None:
            return human, machine
        trials = self.trials()
        for question in QUESTIONS:
            for name in human[question]:
                trial = trials.get(name)
                if trial is None:  # of an earlier state of the stores
                    continue
                try:
                    features = [self._features(source) for source in trial.sources]
                except SGIDError:
                    continue
                if question == "difference":
                    machine[question][name] = 1 - float((features[0] * features[1]).sum())
                elif len(self.labels) > 1:
                    probabilities = self.scorer.probabilities(features[0][None], self.labels)[0]
                    machine[question][name] = float(probabilities[self.labels.index(trial.label)])
                    machine.setdefault("seen", {})[name] = float(self.labels[int(probabilities.argmax())] == trial.label)
        return human, machine

    def _features(self, source: Source) -> torch.Tensor:
        if source not in self._measured:
            assert self.scorer is not None
            self._measured[source] = self.scorer.image_features([self._load(source)])[0]
        return self._measured[source]

    def _figures(self, arm: str, answers: Sequence[Answer], machine: dict[str, dict[str, float]]) -> Figures:
        seen = [answer.is_right for answer in answers if answer.question == "class"]
        rated = [float(answer.answer) for answer in answers if answer.question == "difference"]
        trials = {answer.trial for answer in answers}
        agreement = [value for name, value in machine.get("seen", {}).items() if name in trials]
        distance = [value for name, value in machine["difference"].items() if name in trials]
        return Figures(
            arm,
            self.names[arm],
            len(seen),
            human_consistency(seen) if seen else None,
            len(rated),
            _mean_interval(rated) if rated else None,
            sum(agreement) / len(agreement) if agreement else None,
            sum(distance) / len(distance) if distance else None,
        )


def _table(answers: Sequence[Answer], labels: Sequence[str]) -> "np.ndarray[Any, Any] | None":
    """Answers by person (rows) and trial (columns) as numbers; NaN where there is none."""
    people, trials = sorted({answer.who for answer in answers}), sorted({answer.trial for answer in answers})
    if len(people) < 2:
        return None
    table = np.full((len(people), len(trials)), np.nan)
    for answer in answers:
        value = (
            labels.index(answer.answer)
            if answer.answer in labels
            else float(answer.answer)
            if answer.answer in RATINGS
            else np.nan
        )
        table[people.index(answer.who), trials.index(answer.trial)] = value
    return table


def _spearman(human: dict[str, float], machine: dict[str, float]) -> float | None:
    from scipy.stats import spearmanr

    both = sorted(human.keys() & machine.keys())
    x, y = [human[name] for name in both], [machine[name] for name in both]
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(spearmanr(x, y).statistic)


def _mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % interval by Student's t; the whole scale for a single value."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 1.0, 5.0
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()


def _seed(key: str, number: int) -> int:
    return int.from_bytes(_hash("randaugment", key, str(number))[:4], "big")


def _padded(items: Sequence[str], length: int) -> list[str]:
    return [*items, *[""] * (length - len(items))]
