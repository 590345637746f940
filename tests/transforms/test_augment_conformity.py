"""The reviewers' list for torchvision transforms, checked for every form in which an image comes."""

import copy
import gc
import math
import os
import pickle
import re
from collections import Counter, UserDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from augment_fakes import OWN_CAPTIONS, batches, captioned, fake_generator, picture, pil_picture
from sgid_transforms.errors import GenerationError, MissingCaptionError, ServiceError
from sgid_transforms.images.keys import image_key
from sgid_transforms.transforms import augment
from sgid_transforms.transforms.augment import SGIDAugment

Make = Callable[..., SGIDAugment]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An SGIDAugment with a fake generator and captions of the pictures 0 to 9."""

    def make(**settings: Any) -> SGIDAugment:
        settings = {"recipe": OWN_CAPTIONS, "p": 1.0, "generator": fake_generator(tmp_path / "log")} | settings
        sgid = SGIDAugment(captions=tmp_path / "captions.sqlite", variants=tmp_path / "variants", **settings)
        sgid.captions.put_many(captioned(*map(picture, range(10))))
        return sgid

    return make


def _grey(image: torch.Tensor) -> torch.Tensor:
    return F.rgb_to_grayscale(image)


FORMS: dict[str, Callable[[], Any]] = {
    "pil": lambda: pil_picture(0),
    "pil-rgba": lambda: _with_alpha(pil_picture(0)),
    "pil-grey": lambda: pil_picture(0).convert("L"),
    "pil-grey-alpha": lambda: _with_alpha(pil_picture(0)).convert("LA"),
    "pil-palette": lambda: pil_picture(0).quantize(),
    "pil-cmyk": lambda: pil_picture(0).convert("CMYK"),
    "uint8": lambda: picture(0),
    "uint8-grey": lambda: _grey(picture(0)),
    "float32": lambda: picture(0).float() / 255,
    "float16": lambda: picture(0).half() / 255,
    "bfloat16": lambda: (picture(0).float() / 255).bfloat16(),
    "float64": lambda: picture(0).double() / 255,
    "tv-uint8": lambda: tv_tensors.Image(picture(0)),
    "tv-float": lambda: tv_tensors.Image(picture(0).float() / 255),
    "tv-grey": lambda: tv_tensors.Image(_grey(picture(0))),
    "not-square": lambda: F.crop(picture(0), 0, 0, 20, 31),
    "channels-last": lambda: picture(0).permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


def _with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _pixels(image: Any) -> torch.Tensor:
    return F.pil_to_tensor(image) if isinstance(image, Image.Image) else image.as_subclass(torch.Tensor)


@pytest.fixture(params=FORMS)
def image(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]()


def test_output_is_of_the_same_form(make: Make, image: Any) -> None:
    sgid = make()
    sgid.captions.put_many(captioned(image))
    before = _pixels(image).clone()
    version = image._version if isinstance(image, torch.Tensor) else 0
    for _ in ("generated", "from the store"):
        output = sgid(image)
        assert type(output) is type(image)
        assert output is not image
        if isinstance(image, Image.Image):
            assert (output.mode, output.size) == (image.mode, image.size)
        else:
            assert (output.shape, output.dtype, output.device) == (image.shape, image.dtype, image.device)
            assert output.is_contiguous()
            assert image._version == version
            if output.is_floating_point():
                assert 0 <= output.min() <= output.max() <= 1
        assert torch.equal(_pixels(image), before)
        assert not torch.equal(_pixels(output).float(), before.float())
    if isinstance(image, Image.Image) and "A" in image.mode:
        assert output.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_every_form_of_a_picture_has_the_same_variant(make: Make) -> None:
    sgid = make(variants_per_image=1)
    expected = _pixels(sgid(pil_picture(0)))
    for form in ("uint8", "tv-uint8", "channels-last"):
        assert torch.equal(_pixels(sgid(FORMS[form]())), expected)
    for form in ("float32", "float64", "tv-float"):
        assert torch.equal(_pixels(sgid(FORMS[form]())), F.to_dtype(expected, FORMS[form]().dtype, scale=True))


def test_identity_at_p_0_draws_nothing(make: Make, image: Any, tmp_path: Path) -> None:
    sgid = make(p=0)
    state = torch.get_rng_state()
    assert sgid(image) is image
    assert sgid(image, 3)[0] is image
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "log").exists()
    assert sgid.stats().gated == 0


def test_eval_is_the_identity(make: Make, image: Any) -> None:
    sgid = make().eval()
    state = torch.get_rng_state()
    assert sgid(image) is image
    assert torch.equal(torch.get_rng_state(), state)
    sgid.captions.put_many(captioned(image))
    assert sgid.train()(image) is not image
    assert not torch.nn.Sequential(sgid).eval()[0].training


def test_untouched_items_are_the_same_objects(make: Make) -> None:
    sgid = make(p=0.5)
    images = [pil_picture(n) for n in range(10)]
    torch.manual_seed(0)
    outputs = sgid(images)
    same = [output is image for output, image in zip(outputs, images, strict=True)]
    assert 0 < sum(same) < 10
    for output, image, untouched in zip(outputs, images, same, strict=True):
        assert untouched or output.tobytes() != image.tobytes()


def test_structure_of_nested_samples_is_kept(make: Make) -> None:
    sgid = make()
    extra = object()
    sample = {"image": pil_picture(0), "label": 1, "more": [{"view": picture(1), "extra": extra}, ("text", None)]}
    output = sgid(sample)
    assert list(output) == list(sample)
    assert (output["label"], output["more"][1]) == (1, ("text", None))
    assert output["more"][0]["extra"] is extra
    assert output["more"][0]["view"] is sample["more"][0]["view"]  # as in v2: beside a PIL image, a plain tensor is data
    assert output["image"].tobytes() != sample["image"].tobytes()


def test_joint_call_keeps_the_label(make: Make) -> None:
    image, label = make()(picture(0), 7)
    assert label == 7
    assert not torch.equal(image, picture(0))
    tensor = torch.tensor(7)
    assert make()(picture(0), tensor)[1] is tensor
    assert make()({"label": tensor, "image": picture(0)})["label"] is tensor  # which comes first must not matter


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, tv_tensors.Image])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches(make: Make, wrap: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, tmp_path: Path) -> None:
    sgid = make(p=0.5, variants_per_image=1)
    batch = wrap(F.to_dtype(torch.stack([picture(n) for n in range(10)]), dtype, scale=True))
    before, version = batch.clone(), batch._version
    torch.manual_seed(0)
    output, labels = sgid(batch, torch.arange(10))
    assert type(output) is type(batch)
    assert (output.shape, output.dtype) == (batch.shape, batch.dtype)
    assert torch.equal(batch, before)
    assert batch._version == version
    changed = [index for index in range(10) if not torch.equal(output[index], batch[index])]
    assert 0 < len(changed) < 10
    assert batches(tmp_path / "log") == [len(changed)]  # one call for all
    single = make(variants_per_image=1)
    assert torch.equal(output[changed[0]], single(batch[changed[0]]))
    assert torch.equal(labels, torch.arange(10))
    assert sgid.eval()(batch) is batch


def test_batch_on_another_device_stays_there(make: Make) -> None:
    # "meta" has no pixels to hash, which is just what shows that the user's own keys spare the transfer.
    sgid = make(p=0.0)
    batch = torch.empty(2, 3, 8, 8, device="meta")
    assert sgid(batch) is batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batch(make: Make, tmp_path: Path) -> None:
    batch = torch.stack([picture(n) for n in range(10)]).cuda()
    cold = make(variants_per_image=1)(batch)
    assert cold.device == batch.device
    assert (tmp_path / "log").read_text().split()[2] == "cuda"  # the generator got the tensors where they were
    assert torch.equal(make(variants_per_image=1)(batch), cold)


def test_before_and_after_mixup_and_cutmix(make: Make) -> None:
    batch, labels = torch.stack([picture(n).float() / 255 for n in range(10)]), torch.arange(10) % 3
    mix = v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])
    images, soft = mix(*make()(batch, labels))
    assert soft.shape == (10, 3)
    sgid = make(missing="original")
    again, same = sgid(images, soft)  # mixed images have no captions
    assert again is images
    assert same is soft
    assert sgid.stats().missing == 10
    class_names = ["cat", "dog", "frog"]
    captioned_now = make(missing="caption", captioner=_Bright(), scorer=None, class_names=class_names)
    again, _ = captioned_now(images, soft)
    assert not torch.equal(again, images)
    for n in range(10):
        record = captioned_now.captions.get(image_key(images[n]))
        assert record.caption.startswith("bright")
        assert record.label == class_names[int(soft[n].argmax())]


class _Bright:
    id = "bright"

    def caption(self, images: list[torch.Tensor]) -> list[str]:
        return [f"bright {int(image.float().mean())}" for image in images]


@pytest.mark.parametrize("module", [v1, v2])
def test_in_compose_and_random_containers(make: Make, module: Any) -> None:
    sgid = make()
    chain = module.Compose([sgid, module.RandomHorizontalFlip(1.0)])
    assert chain(pil_picture(0)).size == (32, 32)
    assert module.RandomApply([sgid], p=1.0)(pil_picture(0)).tobytes() != pil_picture(0).tobytes()
    assert module.RandomChoice([sgid])(pil_picture(0)).size == (32, 32)
    assert sgid.stats().gated == 3


@pytest.mark.parametrize(
    "annotation",
    [
        tv_tensors.BoundingBoxes([[0, 0, 4, 4]], format="XYXY", canvas_size=(32, 32)),
        tv_tensors.Mask(torch.zeros(1, 32, 32)),
        tv_tensors.Video(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
        *([tv_tensors.KeyPoints([[1, 2]], canvas_size=(32, 32))] if hasattr(tv_tensors, "KeyPoints") else []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_fit_is_refused(make: Make, annotation: Any) -> None:
    with pytest.raises(ValueError, match=f"does not support {type(annotation).__name__}"):
        make()(pil_picture(0), {"target": annotation})


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.zeros(4, 8, 8), ValueError),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), ValueError),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError),
        (Image.new("I;16", (8, 8)), TypeError),
        (Image.new("F", (8, 8)), TypeError),
        (torch.full((3, 8, 8), 2.0), ValueError),
    ],
)
def test_what_is_no_picture_is_refused(make: Make, image: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()(image)


def test_samples_without_an_image_pass(make: Make) -> None:
    sample = {"text": "no image", "label": torch.tensor([1, 2])}
    assert make()(sample) is sample


def test_holds_no_weights_and_pickles_small(make: Make) -> None:
    sgid = make()
    sgid(pil_picture(0))
    assert not list(sgid.modules())[1:]
    assert not sgid.state_dict()
    assert not list(sgid.parameters())
    data = pickle.dumps(sgid)
    assert len(data) <= 16 * 1024
    clone = pickle.loads(data)  # noqa: S301
    assert clone(pil_picture(0)).size == (32, 32)
    assert clone.stats().seen == 1  # a copy in the same process counts for itself
    assert repr(clone) == repr(sgid)


def test_repr_is_one_line_with_the_settings(make: Make, tmp_path: Path) -> None:
    text = repr(make(p=0.25))
    assert "\n" not in text
    for part in ("model='tiny'", "p=0.25", "variants_per_image=4", "on_miss='generate'", "missing='error'", str(tmp_path)):
        assert part in text


def test_deepcopy_is_independent(make: Make) -> None:
    sgid = make()
    other = copy.deepcopy(sgid).eval()
    assert sgid.training
    assert not other.training
    other.p = 0.1
    assert sgid.p == 1.0


def test_one_transform_costs_one_descriptor_and_gives_it_back(make: Make) -> None:
    make()(pil_picture(0))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        sgid = make()
        sgid(pil_picture(0))
        sgid.captions.close()
        del sgid
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


# --- the gate


def test_fraction_replaced_and_choice_of_variants(make: Make) -> None:
    sgid = make(p=0.3, variants_per_image=4)
    image = picture(0)
    torch.manual_seed(0)
    replaced: Counter[bytes] = Counter()
    draws = 20_000
    for _ in range(draws // 100):
        for output in sgid.augment([image] * 100):
            if output is not image:
                replaced[output.numpy().tobytes()] += 1
    hit = sum(replaced.values())
    assert abs(hit / draws - 0.3) < 3 * math.sqrt(0.3 * 0.7 / draws)
    assert len(replaced) == 4
    chi_square = sum((count - hit / 4) ** 2 / (hit / 4) for count in replaced.values())
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand
    assert sgid.stats().seen == draws
    assert sgid.stats().gated == hit
    assert sgid.stats().generated == 4


def test_random_numbers_do_not_depend_on_what_is_stored(make: Make) -> None:
    def run() -> tuple[torch.Tensor, list[bytes]]:
        torch.manual_seed(5)
        outputs = [sgid(pil_picture(n)).tobytes() for n in range(10)]
        return torch.get_rng_state(), outputs

    sgid = make(p=0.5)
    cold, cold_outputs = run()
    warm, warm_outputs = run()
    assert torch.equal(cold, warm)
    assert cold_outputs == warm_outputs
    assert sgid.stats().hits == sgid.stats().misses > 0


def test_p_by_class(make: Make) -> None:
    sgid = make(p={"rare": 1.0, "*": 0.0}, class_names=["cat", "rare"])
    sgid.captions.put_many(captioned(picture(20), label="rare"))
    assert sgid(picture(0)) is not None
    image = picture(0)
    assert sgid(image) is image  # "cat" by the caption store
    assert sgid(picture(20)).sum() != picture(20).sum()
    assert sgid(image, 0)[0] is image
    assert sgid(picture(0), 1)[0].sum() != picture(0).sum()  # the given label is asked first
    assert sgid((image, "cat"))[0] is image


def test_balanced_p(make: Make) -> None:
    sgid = make(p="balanced", on_miss="original")  # ten cats
    sgid.captions.put_many(captioned(picture(20), label="frog"))
    torch.manual_seed(0)
    for _ in range(10):
        sgid.augment([picture(0)] * 100 + [picture(20)] * 100, ["cat"] * 100 + ["frog"] * 100)
    share = sgid.stats().gated / sgid.stats().seen
    assert abs(share - (0.5 + 0.95) / 2) < 0.03


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "half", None, True, {"cat": 2}, [0.5]])
def test_wrong_p_is_refused(make: Make, p: Any) -> None:
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\]"):
        make(p=p)
    sgid = make()
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\]"):
        sgid.p = p
    assert sgid.p == 1.0


@pytest.mark.parametrize(
    "settings", [{"variants_per_image": 0}, {"on_miss": "wait"}, {"missing": "ignore"}, {"on_error": "pass"}]
)
def test_wrong_settings_are_refused(make: Make, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        make(**settings)


# --- misses and failures


def test_missing_caption(make: Make) -> None:
    stranger = pil_picture(99)
    with pytest.raises(MissingCaptionError, match=r"sgid\.prepare\(dataset\)"):
        make()(stranger)
    sgid = make(missing="original")
    assert sgid(stranger) is stranger
    assert sgid.stats().missing == 1
    assert make(on_miss="original")(stranger) is stranger


def test_missing_label(make: Make) -> None:
    sgid = make(missing="caption", captioner=_Bright(), scorer=None)
    with pytest.raises(MissingCaptionError, match="no name for label 3"):
        sgid(picture(99), 3)
    assert sgid((picture(99), "tabby_cat"))[0].sum() != picture(99).sum()
    assert sgid.captions.get(image_key(picture(99))).label == "tabby cat"


def test_original_on_miss(make: Make, tmp_path: Path) -> None:
    sgid = make(on_miss="original", variants_per_image=1)
    image = pil_picture(0)
    assert sgid(image) is image
    assert not (tmp_path / "log").exists()
    make(variants_per_image=1)(image)
    assert sgid(image).tobytes() != image.tobytes()
    assert (sgid.stats().misses, sgid.stats().hits) == (1, 1)


def test_filtered_variant_is_the_original_and_is_not_tried_again(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sgid = make(generator=fake_generator(tmp_path / "log", reject=True), variants_per_image=1)
    image = pil_picture(0)
    for _ in range(3):
        assert sgid(image) is image
    assert batches(tmp_path / "log") == [1]
    assert (sgid.stats().filtered, sgid.stats().unavailable) == (1, 2)
    assert len(caplog.records) == 1
    assert "black" in caplog.text


def test_generator_errors_are_raised_or_counted(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = fake_generator(fail=True)
    with pytest.raises(GenerationError, match="ValueError: the generator is broken"):
        make(generator=broken)(pil_picture(0))
    sgid = make(generator=broken, on_error="original")
    image = pil_picture(0)
    for _ in range(3):
        assert sgid(image) is image
    assert (sgid.stats().fallbacks, sgid.stats().failed) == (3, 3)
    assert len(caplog.records) == 1  # once a minute


def test_originals_in_place_of_variants_are_reported_once_a_minute_with_their_number(
    make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(augment, "time", SimpleNamespace(monotonic=lambda: now))
    sgid = make(generator=fake_generator(fail=True), on_error="original")
    for moment in (1000.0, 1001.0, 1059.0, 1061.0, 1062.0, 1200.0):
        now = moment
        sgid(pil_picture(0))
    counts = [re.search(r"\((\d+) so far", record.getMessage()) for record in caplog.records]
    assert [int(found[1]) for found in counts if found] == [1, 4, 6]
    assert all("the generator is broken" in record.getMessage() for record in caplog.records)


def test_queue_needs_a_service(make: Make) -> None:
    with pytest.raises(ServiceError, match=r"with sgid\.serve\(\)"):
        make(on_miss="queue")(pil_picture(0))


def test_forked_cuda_is_refused_with_the_way_out(make: Make) -> None:
    sgid = make(generator=_cuda_in_a_fork)
    with pytest.raises(ServiceError, match=r"sgid\.serve\(device='cuda'\)"):
        sgid(pil_picture(0))


def _cuda_in_a_fork(recipe: Any, device: str, **options: Any) -> Any:
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, ...")


def test_own_keys(make: Make) -> None:
    sgid = make(key=_first_pixel, variants_per_image=1)
    sgid.captions.put_many([*captioned(picture(0))[:0]])
    image = picture(0)
    record = captioned(image)[0]
    sgid.captions.put_many([type(record)(sgid.key_of(image), record.caption, label="cat")])
    first = sgid(image)
    same_name = image.clone()
    same_name[:, 5] = 0
    assert torch.equal(sgid(same_name), first)
    resized = sgid(F.resize(image, [16, 16], interpolation=v2.InterpolationMode.NEAREST))
    assert resized.shape == (3, 16, 16)


def _first_pixel(image: torch.Tensor) -> str:
    return f"image {image[:, 0, 0].tolist()}"


def test_label_too_long_for_the_text_encoder_is_told(make: Make) -> None:
    sgid = make(generator=_short_sighted)
    with pytest.raises(GenerationError, match="class_names"):
        sgid(picture(0))


class _Tokenizer:
    model_max_length = 4

    def __call__(self, text: str) -> dict[str, list[str]]:
        return {"input_ids": ["<", *text.split(), ">"]}


def _short_sighted(recipe: Any, device: str, **options: Any) -> Any:
    generator = fake_generator()(recipe, device)
    generator.tokenizer, generator.max_tokens = _Tokenizer(), 4
    return generator


def test_summary_counts_since_the_last_one(make: Make) -> None:
    sgid = make(variants_per_image=1)
    sgid(pil_picture(0))
    assert sgid.epoch_summary().startswith(
        "SGID: 1 seen, 1 gated, 0 hits, 1 misses, 1 generated, 0 filtered, 0 failed, mean wait"
    )
    sgid(pil_picture(0))
    sgid(pil_picture(0))
    assert sgid.epoch_summary().startswith("SGID: 2 seen, 2 gated, 2 hits, 0 misses, 0 generated")
    assert sgid.stats().seen == 3


@pytest.mark.parametrize(
    "sample",
    [
        np.zeros((32, 32, 3), np.uint8),
        {"image": np.zeros((32, 32, 3), np.uint8), "mask": np.zeros((32, 32), np.uint8)},
        (np.zeros((32, 32), np.float32), 3),
        torch.zeros(28, 28, dtype=torch.uint8),
    ],
    ids=["opencv", "albumentations", "grey", "no channel"],
)
def test_images_in_a_form_that_is_not_taken_are_refused_instead_of_passed_by(make: Make, sample: Any) -> None:
    """They came back untouched: a whole training ran without a single variant and without a word."""
    with pytest.raises((TypeError, ValueError), match=r"convert it with v2\.ToImage|has no channels"):
        make()(sample)


def test_other_tensors_beside_an_image_pass_through(make: Make) -> None:
    extras = {
        "mask": torch.zeros(1, 32, 32, dtype=torch.int64),
        "flow": torch.zeros(2, 32, 32),
        "ids": torch.arange(6).view(1, 2, 3),
    }
    output = make()({"image": pil_picture(0), **extras})
    assert all(output[name] is value for name, value in extras.items())
    assert output["image"].tobytes() != pil_picture(0).tobytes()


def test_a_device_that_is_not_there_obeys_on_error(make: Make) -> None:
    def on_cuda(recipe: Any, device: str, **options: Any) -> Any:
        raise AssertionError("Torch not compiled with CUDA enabled")

    with pytest.raises(GenerationError, match="not compiled with CUDA"):
        make(generator=on_cuda)(pil_picture(0))
    sgid = make(generator=on_cuda, on_error="original")
    image = pil_picture(0)
    assert sgid(image) is image
    assert sgid.stats().fallbacks == 1


@pytest.mark.parametrize(
    ("sample", "word"),
    [
        (lambda: torch.rand(28, 28), "has no channels"),
        (lambda: (torch.zeros(28, 28), 3), "has no channels"),
        (lambda: torch.zeros(2, 3, 3, 8, 8), "too many dimensions"),
        (lambda: [torch.zeros(1, 2, 3, 3, 8, 8, dtype=torch.uint8)], "too many dimensions"),
    ],
)
def test_tensors_that_are_no_images_are_not_passed_over(make: Make, sample: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()(sample())


def test_sparse_tensors_are_refused(make: Make) -> None:
    with pytest.raises(TypeError, match=r"layout torch.sparse_coo; pass a dense one"):
        make()(torch.zeros(3, 8, 8, dtype=torch.uint8).to_sparse())


def test_a_mask_beside_a_numpy_image_is_not_taken_for_the_image(make: Make) -> None:
    sample = {"image": np.zeros((8, 8, 3), np.uint8), "mask": torch.zeros(1, 8, 8, dtype=torch.uint8)}
    with pytest.raises(TypeError, match=r"NumPy array of shape \(8, 8, 3\)"):
        make()(sample)


@pytest.mark.parametrize(
    "sample", [UserDict(image=pil_picture(0)), {"image": {"bytes": b"x"}}, object(), 7], ids=lambda one: type(one).__name__
)
def test_a_sample_without_an_image_is_told_once(make: Make, caplog: pytest.LogCaptureFixture, sample: Any) -> None:
    sgid = make()
    for _ in range(3):
        assert sgid(sample) is sample
    assert caplog.text.count("a sample holds no image that could be replaced") == 1


@pytest.mark.parametrize(
    "names",
    ["cat", "names.json", b"cat", {"cat", "dog"}, 3, ["cat", None], iter(["cat"]), {0: None}],
    ids=lambda one: type(one).__name__,
)
def test_class_names_that_name_nothing_are_refused(make: Make, names: Any) -> None:
    with pytest.raises(TypeError, match=r"class_names is .*; pass a list with a name for each class number"):
        make(class_names=names)


@pytest.mark.parametrize(
    "names",
    [["cat"], ("cat",), np.array(["cat"]), {0: "cat"}, {"n01": "cat"}, [("cat", "kitten")]],
    ids=lambda one: type(one).__name__,
)
def test_class_names_in_every_usual_form_are_taken(make: Make, names: Any) -> None:
    assert make(class_names=names).class_names is names


@pytest.mark.parametrize("recipe", ["tiny", {"model": "tiny"}, Path("r.toml")], ids=repr)
def test_a_recipe_of_another_type_is_refused(make: Make, recipe: Any) -> None:
    with pytest.raises(TypeError, match="pass a Recipe"):
        make(recipe=recipe)


@pytest.mark.parametrize("count", [0, -1, True, "4", None, 1.5, 10**30])
def test_a_number_of_variants_that_is_none_is_refused(make: Make, count: Any) -> None:
    with pytest.raises(ValueError, match="variants_per_image"):
        make(variants_per_image=count)


def test_numpy_counts_are_numbers(make: Make) -> None:
    assert make(variants_per_image=np.int64(2)).variants_per_image == 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(make: Make, seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        make(timeout=seconds)
