"""The study's questions and its figures, against values worked out by hand."""

import csv
import io
from typing import ClassVar

import pytest

pytest.importorskip("krippendorff", reason="the review extra is not installed")

from sgid_transforms.report.answers import Answer, Answers, to_csv
from sgid_transforms.report.metrics import human_consistency
from sgid_transforms.review.gallery import NotFoundError
from sgid_transforms.review.study import Study
from sgid_transforms.variants.verdicts import Verdict


@pytest.fixture
def study(gallery, tmp_path):
    return Study([gallery], ["mine"], Answers(tmp_path / "answers.sqlite"), images=4)


def test_each_original_is_asked_about_in_every_arm(study, stores):
    trials = list(study.trials().values())
    assert len(trials) == 4 * 3 * 2  # originals, arms, questions
    assert {trial.arm for trial in trials} == {"originals", "randaugment", stores.recipe.fingerprint}
    assert sorted(trial.label for trial in trials if trial.question == "class") == ["cat"] * 6 + ["dog"] * 6
    assert all(len(trial.sources) == (2 if trial.question == "difference" else 1) for trial in trials)
    assert all(len(set(trial.sources)) == len(trial.sources) for trial in trials)


def test_nothing_tells_where_a_picture_comes_from(study, stores):
    secrets = {"originals", "randaugment", stores.recipe.fingerprint, "mine", *(image.key for image in stores.scan.images)}
    for _ in range(24):
        asked = study.next("anna")
        assert set(asked) == {"done", "total", "trial", "question", "pictures", "choices"}
        assert not any(secret in repr(asked) for secret in secrets)
        for address in asked["pictures"]:
            data, kind = study.picture(address.rpartition("/")[2])
            assert data
            assert kind == "image/png"
        study.answer("anna", asked["trial"], asked["choices"][0])
    assert study.next("anna")["trial"] is None
    assert study.next("ben")["done"] == 0


def test_everybody_has_another_order_and_goes_on_where_they_stopped(study, gallery):
    first = {who: study.next(who)["trial"] for who in map(str, range(8))}
    assert len(set(first.values())) > 1
    study.answer("1", first["1"], study.next("1")["choices"][0])
    again = Study([gallery], ["mine"], Answers(study.answers.path), images=4)
    assert again.next("1")["done"] == 1
    assert again.next("2")["trial"] == first["2"]


def test_rejected_variants_are_not_asked_about(gallery, tmp_path, stores):
    stores.variants.judge(
        Verdict(ref.fingerprint, ref.key, ref.variant, "reject", "anna", 1.0)
        for ref in stores.variants.iter(stores.recipe)
        if ref.variant != 3
    )
    assert Study([gallery], ["mine"], Answers(tmp_path / "a.sqlite")).trials() == {}


@pytest.mark.parametrize(("trial", "answer"), [("nothing", "cat"), (None, "horse"), (None, "9")])
def test_an_answer_that_was_not_a_choice_is_refused(study, trial, answer):
    with pytest.raises(NotFoundError, match="reload the page"):
        study.answer("anna", trial or study.next("anna")["trial"], answer)
    assert study.answers.all() == []


class TestFigures:
    """Three people, four questions of each kind about the recipe's variants.

    Class: the label is seen 9 times of 12, so Wilson's interval is (0.4677, 0.9111). Differences: 1 2 3 4, 1 2 3 4 and 2 2 3 5:
    mean 32/12; s = 1.2309, t(11) = 2.2010, half width 0.7821.
    """

    SEEN: ClassVar = {"anna": "1110", "ben": "1110", "carl": "1101"}
    RATED: ClassVar = {"anna": "1234", "ben": "1234", "carl": "2235"}

    @pytest.fixture
    def results(self, study, stores):
        arm = stores.recipe.fingerprint
        for kind, given in (("class", self.SEEN), ("difference", self.RATED)):
            trials = sorted(
                (trial for trial in study.trials().values() if trial.arm == arm and trial.question == kind),
                key=lambda trial: trial.label,
            )
            for who, values in given.items():
                for trial, value in zip(trials, values, strict=True):
                    other = "dog" if trial.label == "cat" else "cat"
                    study.answer(who, trial.id, value if kind == "difference" else trial.label if value == "1" else other)
        return study.results()

    def test_means_and_intervals(self, results, stores):
        (figures,) = results.figures
        assert (figures.arm, figures.name, figures.seen, figures.rated) == (stores.recipe.fingerprint, "mine", 12, 12)
        assert figures.consistency == pytest.approx((0.75, 0.4677, 0.9111), abs=1e-4)
        assert figures.diversity == pytest.approx((32 / 12, 32 / 12 - 0.7821, 32 / 12 + 0.7821), abs=1e-3)
        assert results.people == ("anna", "ben", "carl")

    def test_agreement_between_people(self, results):
        """By hand: labels c c d d, answers c c d c, c c d c and c c c d: 9 c and 3 d. In each of the last two questions, 4
        of the 6 ordered pairs of answers differ, each weighted by 1/2.
        """
        observed, expected = (4 / 2 + 4 / 2) / 12, 2 * 9 * 3 / (12 * 11)
        assert results.alpha["class"] == pytest.approx(1 - observed / expected)
        assert 0.8 < results.alpha["difference"] < 1

    def test_the_table_of_answers(self, results, study):
        table = list(csv.DictReader(io.StringIO(to_csv(study.answers.all()))))
        assert len(table) == 24
        assert sum(int(row["right"]) for row in table if row["question"] == "class") == 9
        assert {row["right"] for row in table if row["question"] == "difference"} == {""}


def test_the_automatic_metrics_stand_beside_them(gallery, tmp_path):
    """A scorer that sees everything as a cat: half of the pictures are, and people who rate by its distance agree with it."""
    import torch

    class Scorer:
        def image_features(self, images):
            return torch.nn.functional.normalize(torch.stack([image.float().mean((1, 2)) + 1 for image in images]), dim=1)

        def text_features(self, texts):
            raise NotImplementedError

        def probabilities(self, features, labels):
            return torch.tensor([[0.9, 0.1]]).expand(len(features), 2)

    study = Study([gallery], ["mine"], Answers(tmp_path / "a.sqlite"), images=4, scorer=Scorer())
    for trial in study.trials().values():
        study.answer("anna", trial.id, trial.label if trial.question == "class" else "3")
    found = study.results()
    assert [figures.name for figures in found.figures] == ["originals", "RandAugment", "mine"]
    assert [figures.agreement for figures in found.figures] == [0.5] * 3
    assert all(figures.distance > 0 for figures in found.figures)
    assert found.alpha == {"class": None, "difference": None}  # nobody else answered
    assert found.correlation == {"class": None, "difference": None}  # all the same answer
    order = sorted(
        (1 - float((study._features(t.sources[0]) * study._features(t.sources[1])).sum()), t.id)
        for t in study.trials().values()
        if t.question == "difference"
    )
    for place, (_, trial) in enumerate(order):
        study.answer("anna", trial, str(1 + 5 * place // len(order)))
    assert study.results().correlation["difference"] > 0.95


def test_no_spreadsheet_runs_a_name():
    assert "'=HYPERLINK(0)" in to_csv([Answer("0", "=HYPERLINK(0)", "class", "originals", "ab", "-cat", "-cat", 0.0)])


def test_consistency_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        human_consistency([])
