"""Captions of the bundled model: one line per image, the same in any batch; and what cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_captioners
from sgid_transforms.errors import ModelLoadError, RecipeError
from sgid_transforms.models.captioner import Captioner
from sgid_transforms.models.checkpoints import resolve_model
from sgid_transforms.recipe.prompts import names


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return Captioner("tiny", batch_size=2)


def pictures(count: int, height: int = 32, width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(count)]


def test_captions_do_not_depend_on_the_batch(captioner: Captioner) -> None:
    images = [*pictures(3), *pictures(1, 20, 48)]
    captions = captioner.caption(images)
    assert captions == [captioner.caption([image])[0] for image in images]
    assert all(caption and "\n" not in caption for caption in captions)
    assert captioner.caption([]) == []


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_thin_images_keep_their_axes(captioner: Captioner, monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    """An array of 3 rows was once read as channels first: its rows became its colours."""
    seen: list[torch.Tensor] = []
    own = captioner._model.generate

    def generate(pixel_values: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(pixel_values)
        return own(pixel_values=pixel_values, **options)

    monkeypatch.setattr(captioner._model, "generate", generate)
    red = torch.zeros(3, height, 40, dtype=torch.uint8)
    red[0] = 255
    square = torch.zeros(3, 40, 40, dtype=torch.uint8)
    square[0] = 255
    captioner.caption([red, square])
    torch.testing.assert_close(seen[0][0], seen[0][1])


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^batch_size is 0; it must be at least 1$"):
        Captioner(batch_size=0)
    with pytest.raises(ModelLoadError, match=r"^the folder './not/there' does not exist; give an existing folder"):
        Captioner("./not/there")
    with pytest.raises(ModelLoadError, match=r"^the captioner '.*' cannot be loaded: "):
        Captioner(str(tmp_path))
    folder = shutil.copytree(resolve_model("tiny", "captioner"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"has only pickled weights \(pytorch_model.bin\), which can run code"):
        Captioner(str(folder))


class TestModes:
    """Captions that know the label: BLIP goes on from a text, chat models get an instruction."""

    @pytest.mark.parametrize("mode", ["label", "context"])
    def test_a_caption_begins_with_its_label_or_never_names_it(self, mode: str) -> None:
        captioner = Captioner("tiny", batch_size=2, mode=mode)
        images, labels = pictures(5), ["cat", "airplane", "cat", "cat", "airplane"]
        captions = captioner.caption(images, labels)
        assert captions == [captioner.caption([i], [label])[0] for i, label in zip(images, labels, strict=True)]
        if mode == "label":
            assert all(caption.startswith(("a cat", "an airplane")) for caption in captions)
        else:
            assert not any(names(caption, label) for caption, label in zip(captions, labels, strict=True))

    def test_the_bundled_model_says_what_is_beside_the_object(self) -> None:
        blue = torch.zeros(3, 32, 32, dtype=torch.uint8)
        blue[2] = 180
        assert "blue background" in Captioner("tiny", mode="context").caption([blue], ["bird"])[0]

    def test_a_label_of_many_words_leaves_room_for_the_caption(self) -> None:
        caption = Captioner("tiny", mode="label").caption(pictures(1), ["cat " * 60])
        assert len(caption) == 1

    def test_labels_that_are_missing(self) -> None:
        captioner = Captioner("tiny", mode="label")
        for labels in (None, ["cat"], ["cat", ""]):
            with pytest.raises(ValueError, match=r"^caption_mode='label' needs the label of each image; pass labels, or use"):
                captioner.caption(pictures(2), labels)
        with pytest.raises(RecipeError, match=r"^mode 'contxt' is unknown \(did you mean 'context'\?\)"):
            Captioner("tiny", mode="contxt")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_captioners.qwen(tmp_path_factory.mktemp("qwen")))


class TestOtherFamilies:
    """Real architectures and processors with random weights: what they write means nothing, what they are asked does."""

    @pytest.mark.parametrize("mode", ["free", "label", "context"])
    def test_a_chat_model_is_asked_through_its_template(self, chat: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        captioner = Captioner(chat, mode=mode, max_new_tokens=6)
        asked: list[str] = []
        own = captioner._model.generate

        def generate(**inputs: Any) -> torch.Tensor:
            asked.extend(captioner._decode(inputs["input_ids"]))
            return own(**inputs)

        monkeypatch.setattr(captioner._model, "generate", generate)
        images, labels = [*pictures(2), *pictures(1, 30, 80)], ["airplane", "cat", "airplane"]
        captions = captioner.caption(images, labels)
        assert len(asked) == 3
        assert all(text.strip().endswith("assistant:") for text in asked)
        assert sum("an airplane" in text for text in asked) == (0 if mode == "free" else 2)
        assert all(("Do not name" in text) == (mode == "context") for text in asked)
        assert not any("assistant" in caption for caption in captions), "the question is no part of the caption"
        assert captions == [captioner.caption([i], [label])[0] for i, label in zip(images, labels, strict=True)]

    def test_florence_is_told_its_task_and_knows_no_labels(self, tmp_path: Path) -> None:
        folder = str(tiny_captioners.florence(tmp_path / "florence"))
        images = pictures(2)
        captioner = Captioner(folder, max_new_tokens=6)
        assert captioner.caption(images) == [captioner.caption([image])[0] for image in images]
        with pytest.raises(
            ModelLoadError, match=r"is a Florence-2, which takes no text beside its task, so caption_mode='label'"
        ):
            Captioner(folder, mode="label")
