"""CLIP scores: of pairs, of labels, and equal to what transformers' own processor and model compute."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

import tiny_text
from sgid_transforms.errors import GenerationError, ModelLoadError
from sgid_transforms.models.clip import CLIPScorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tiny_text.clip_model().save_pretrained(path)
    tiny_text.clip_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> CLIPScorer:
    return CLIPScorer(str(folder), batch_size=2).load()


def pictures(count: int, height: int = 32, width: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(count)]


def test_features_are_unit_vectors_of_any_batch(scorer: CLIPScorer) -> None:
    images = pictures(5)
    features = scorer.image_features(images)
    assert features.shape == (5, tiny_text.WIDTH)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cat([scorer.image_features([image]) for image in images]), features)
    texts = scorer.text_features(["a cat", "a dog that runs", "a cat"])
    assert torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])
    assert scorer.image_features([]).shape == scorer.text_features([]).shape == (0, tiny_text.WIDTH)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (20, 37), (100, 33), (3, 40)])
def test_equals_transformers_own_processor_and_model(scorer: CLIPScorer, height: int, width: int) -> None:
    images, texts = pictures(2, height, width), ["a photo of a cat", "a very different text"]
    pil = [to_pil_image(image) for image in images]
    inputs = tiny_text.clip_processor()(images=pil, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = tiny_text.clip_model()(**inputs)
    expected = (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(scorer.image_text(images, texts), expected, atol=1e-5, rtol=0)
    logits = scorer.label_probabilities(images, ["cat", "dog"])
    assert logits.shape == (2, 2)
    torch.testing.assert_close(logits.sum(1), torch.ones(2))


@pytest.mark.parametrize(("height", "width"), [(16, 700), (700, 15), (33, 2000)])
def test_a_very_long_image_is_cropped_before_it_is_resized(scorer: CLIPScorer, height: int, width: int) -> None:
    """To the same features: what the processor resizes and then crops away takes gigabytes."""
    image = v2.functional.gaussian_blur(pictures(1, height, width)[0], [9, 9])
    own = scorer._processor(images=[image], input_data_format="channels_first", return_tensors="pt")
    with torch.no_grad():
        output = scorer._model.get_image_features(pixel_values=own["pixel_values"])
    expected = torch.nn.functional.normalize(output.pooler_output, dim=-1)
    assert (scorer.image_features([image]) * expected).sum() > 0.999


def test_a_clip_with_only_fp16_files_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    with pytest.raises(ModelLoadError, match=r"fp16"):
        CLIPScorer(str(tmp_path)).load()


def test_label_probabilities_are_the_softmax_of_clips_logits(scorer: CLIPScorer) -> None:
    images, labels = pictures(2), ["cat", "dog", "ship"]
    pil = [to_pil_image(image) for image in images]
    texts = [f"a photo of a {label}" for label in labels]
    inputs = tiny_text.clip_processor()(images=pil, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = tiny_text.clip_model()(**inputs).logits_per_image.softmax(1)
    torch.testing.assert_close(scorer.label_probabilities(images, labels), expected, atol=1e-5, rtol=0)


def test_an_image_is_most_similar_to_itself(scorer: CLIPScorer) -> None:
    images = pictures(3)
    torch.testing.assert_close(scorer.image_image(images, images), torch.ones(3))
    assert bool((scorer.image_image(images, images[::-1])[[0, 2]] < 1).all())


def test_texts_are_encoded_once(scorer: CLIPScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = scorer._model.get_text_features

    def counting(**inputs: torch.Tensor) -> object:
        calls.append(len(inputs["input_ids"]))
        return own(**inputs)

    monkeypatch.setattr(scorer._model, "get_text_features", counting)
    for _ in range(3):
        scorer.text_features(["first new text", "second", "second", "third"])
    assert calls == [2, 1]


def test_the_text_cache_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgid_transforms.models.clip._TEXT_CACHE", 3)
    scorer = CLIPScorer(str(folder))
    assert scorer.text_features([f"text {i}" for i in range(8)]).shape[0] == 8
    assert len(scorer._texts) == 3


def test_a_long_text_is_cut(scorer: CLIPScorer) -> None:
    assert bool(scorer.text_features(["word " * 200]).isfinite().all())


def test_pickles_without_its_weights(scorer: CLIPScorer) -> None:
    data = pickle.dumps(scorer)
    assert len(data) < 2000
    images = pictures(2)
    assert torch.equal(pickle.loads(data).image_features(images), scorer.image_features(images))  # noqa: S301


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CLIPScorer(str(folder)).load()
    assert capfd.readouterr() == ("", "")


def test_ids() -> None:
    assert CLIPScorer("a/b").id == "a/b"
    assert CLIPScorer("a/b", revision="v2").id == "a/b@v2"


def test_what_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config.json, so it is not a CLIP model; give a folder made by"):
        CLIPScorer(str(tmp_path)).load()
    tiny_text.t5_text_encoder().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"is a t5 model, not a CLIP; choose one such as openai/clip-vit-base-patch32$"):
        CLIPScorer(str(tmp_path)).load()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"has only pickled weights \(pytorch_model.bin\)"):
        CLIPScorer(str(tmp_path)).load()
    with pytest.raises(ModelLoadError, match=r"^the CLIP model 'some/thing' cannot be loaded: "):
        CLIPScorer("some/thing", local_files_only=True).load()


def test_bad_arguments(scorer: CLIPScorer) -> None:
    images = pictures(2)
    with pytest.raises(GenerationError, match=r"^2 images but 1 texts; pass one text for each image$"):
        scorer.image_text(images, ["one"])
    with pytest.raises(GenerationError, match=r"^2 images but 1 others; pass them in pairs$"):
        scorer.image_image(images, images[:1])
    with pytest.raises(GenerationError, match=r"^there are no labels to choose from"):
        scorer.label_probabilities(images, [])
    with pytest.raises(GenerationError, match=r"^a label comes twice"):
        scorer.label_probabilities(images, ["cat", "cat"])
    with pytest.raises(GenerationError, match=r"^an image has shape \(3, 8, 8\) and dtype torch.float32; pass uint8 tensors"):
        scorer.image_features([torch.zeros(3, 8, 8)])
    with pytest.raises(GenerationError, match=r"^batch_size 0 leaves no room"):
        CLIPScorer(batch_size=0)
