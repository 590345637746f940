"""A setting or a text that changes never returns what was made before: for every such change, with real stores."""

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

from augment_fakes import FakeCaptioner, FakeScorer, batches, fake_generator, image_folder, picture, pil_picture
from sgid_transforms.captions import CaptionRecord
from sgid_transforms.errors import ServiceError
from sgid_transforms.images.keys import image_key
from sgid_transforms.recipe import Recipe, SimilarityGuidance
from sgid_transforms.transforms.augment import SGIDAugment

RECIPE = Recipe(guidance=SimilarityGuidance(2, 4), caption_from="own")


class OtherScorer(FakeScorer):
    """Scores the other way round."""

    def image_text(self, images: Any, texts: Any) -> torch.Tensor:
        return 1 - super().image_text(images, texts)


class OtherCaptioner(FakeCaptioner):
    id = "another"

    def caption(self, images: Any) -> list[str]:
        return [f"a picture of {text}" for text in super().caption(images)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SGIDAugment]:
    def make(**settings: Any) -> SGIDAugment:
        usual = {
            "recipe": RECIPE,
            "captioner": FakeCaptioner(),
            "scorer": FakeScorer(),
            "generator": fake_generator(tmp_path / "log"),
        }
        return SGIDAugment(
            captions=tmp_path / "captions.sqlite",
            variants=tmp_path / "variants",
            p=1.0,
            variants_per_image=1,
            **usual | settings,
        )

    return make


def _edit_caption(sgid: SGIDAugment) -> None:
    record = sgid.captions.get(image_key(picture(0)))
    sgid.captions.put(CaptionRecord(record.key, "my own words", source="human"))


def _add_lora(folder: Path) -> Recipe:
    (folder / "style.safetensors").write_bytes(b"weights")
    return RECIPE.replace(lora=folder / "style.safetensors")


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "class name": lambda folder: {"class_names": {"cat": "kat"}},
    "template": lambda folder: {"recipe": RECIPE.replace(prompt="a drawing of a {label}, {caption}")},
    "captioner": lambda folder: {"captioner": OtherCaptioner()},
    "scorer": lambda folder: {"scorer": OtherScorer()},
    "adapter": lambda folder: {"recipe": _add_lora(folder)},
    "caption": lambda folder: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_old_variant_is_not_found(make: Callable[..., SGIDAugment], tmp_path: Path, change: str) -> None:
    """`class_names={"cat": "kat"}` fixed, prepared again: the "kat" variant was a hit; so it was for all of these."""
    data = ImageFolder(image_folder(tmp_path / "data"))
    sgid = make()
    sgid.prepare(data, progress=False)
    sgid(pil_picture(0))
    assert make()(pil_picture(0)) is not None
    assert sum(batches(tmp_path / "log")) == 1  # the second one was a hit
    changed = make(**CHANGES[change](tmp_path))
    if change == "caption":
        _edit_caption(changed)
    changed.prepare(data, progress=False)
    changed(pil_picture(0))
    assert (changed.stats().hits, changed.stats().generated) == (0, 1)
    changed(pil_picture(0))
    assert changed.stats().hits == 1


def test_back_to_the_old_setting_finds_the_old_variant(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    data = ImageFolder(image_folder(tmp_path / "data"))
    for names in ({}, {"cat": "kat"}, {}):
        sgid = make(class_names=names or None)
        sgid.prepare(data, progress=False)
        sgid(pil_picture(0))
    assert sum(batches(tmp_path / "log")) == 2


@pytest.mark.parametrize(
    ("change", "captioned", "scored", "changed"),
    [
        ("class name", 0, 4, {"label": 4}),
        ("template", 0, 12, {"prompt": 12}),
        ("captioner", 12, 12, {"captioner": 12}),
        ("scorer", 0, 12, {"scorer": 12}),
        ("adapter", 0, 0, {}),
        ("caption", 0, 1, {}),
    ],
)
def test_prepare_redoes_exactly_what_depends_on_the_change_and_says_so(
    make: Callable[..., SGIDAugment],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
    captioned: int,
    scored: int,
    changed: dict[str, int],
) -> None:
    data = ImageFolder(image_folder(tmp_path / "data"))
    make().prepare(data, progress=False)
    sgid = make(**CHANGES[change](tmp_path))
    if change == "caption":
        _edit_caption(sgid)
    report = sgid.prepare(data, progress=False)
    assert (report.captioned, report.scored, report.changed) == (captioned, scored, changed)
    assert len(caplog.records) == bool(changed)
    again = sgid.prepare(data, progress=False)
    assert (again.captioned, again.scored, again.known) == (0, 0, 12)


def test_human_captions_survive_another_captioner(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    data = ImageFolder(image_folder(tmp_path / "data"))
    sgid = make()
    sgid.prepare(data, progress=False)
    _edit_caption(sgid)
    other = make(captioner=OtherCaptioner())
    assert other.prepare(data, progress=False).captioned == 11
    assert other.captions.get(image_key(picture(0))).caption == "my own words"


def test_ranks_do_not_mix_two_scorers(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    data = ImageFolder(image_folder(tmp_path / "data"))
    make().prepare(data, progress=False)
    sgid = make(scorer=OtherScorer())
    sgid.prepare(data, progress=False)
    order = sorted(sgid.captions, key=lambda record: record.similarity)
    assert [record.rank for record in order] == sorted(record.rank for record in order)
    assert {record.scorer for record in order} == {"OtherScorer"}


def test_more_images_leave_the_addresses_of_those_before_them(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    """Ranks are of the data set: with each new image those of all others moved a little, and with them the guidance."""
    sgid = make()
    sgid.prepare(ImageFolder(image_folder(tmp_path / "data")), progress=False)
    before = {record.key: record.rank for record in sgid.captions}
    extra = tmp_path / "more"
    (extra / "cat").mkdir(parents=True)
    for number in range(100, 105):
        pil_picture(number).save(extra / "cat" / f"{number}.png")
    sgid.prepare(ImageFolder(extra), progress=False)
    ranks = {record.key: record.rank for record in sgid.captions}
    assert before.items() <= ranks.items()
    assert all(0 <= rank <= 1 for rank in ranks.values())


def test_a_model_and_a_recipe_that_differ_are_refused(tmp_path: Path) -> None:
    """`SGIDAugment("stabilityai/sd-turbo", recipe=Recipe())` silently used the bundled model."""
    stores = {"captions": tmp_path / "c.sqlite", "variants": tmp_path / "v"}
    with pytest.raises(ValueError, match="model is 'stabilityai/sd-turbo' and the recipe's model is 'tiny'; give one"):
        SGIDAugment("stabilityai/sd-turbo", recipe=Recipe(), **stores)
    assert SGIDAugment("sd-turbo", recipe=Recipe(model="stabilityai/sd-turbo"), **stores).recipe.num_inference_steps == 4


def test_an_interrupt_never_shifts_answers(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    """After a notebook's stop button the client kept its link: answers were one late for good, cats came back for dogs."""
    hold = tmp_path / "go"
    sgid = make(generator=fake_generator(tmp_path / "log", hold=hold))
    sgid.captions.put_many(
        CaptionRecord(image_key(picture(number)), "a caption", label="cat", rank=0.5) for number in range(10)
    )
    with sgid.serve(device="cpu", max_wait=0):
        interrupt = threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            sgid(picture(0))
        interrupt.join()
        hold.touch()
        shifts = set()
        for number in range(10):
            moved = (sgid(picture(number)).int() - picture(number).int()).remainder(256)
            assert len(moved.unique()) == 1, f"picture {number} came back as another one"
            shifts.add(int(moved[0, 0, 0]))
        assert len(shifts) > 1  # by its own seed each


def test_a_service_of_another_recipe_is_not_asked(make: Callable[..., SGIDAugment], tmp_path: Path) -> None:
    first, second = make(), make(recipe=RECIPE.replace(seed=1))
    record = CaptionRecord(image_key(picture(0)), "a caption", label="cat", rank=0.5)
    first.captions.put(record)
    with first.serve(device="cpu", rendezvous=tmp_path / "job"):
        first(picture(0))
        with second.serve(device="cpu", rendezvous=tmp_path / "job"), pytest.raises(ServiceError, match="not of"):
            second(picture(0))


def test_the_order_of_captions_and_images_does_not_matter(make: Callable[..., SGIDAugment]) -> None:
    sgid = make()
    records = [CaptionRecord(image_key(picture(n)), "a caption", label="cat", rank=0.5) for n in range(3)]
    sgid.captions.put_many(records)
    first = [sgid(picture(n)) for n in range(3)]
    sgid.captions.put_many(replace(record, path=f"{record.key}.png") for record in reversed(records))
    assert all(torch.equal(sgid(picture(n)), first[n]) for n in (2, 0, 1))
