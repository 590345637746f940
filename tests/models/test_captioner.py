"""Captions of the bundled model: one line per image, the same in any batch; and what cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.captioner import Captioner
from sgid_transforms.models.checkpoints import resolve_model


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
