"""Every image-to-image family of diffusers is either run by the tests or named, with a reason, in docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sgid_transforms.generation.engine import NativeEngine
from sgid_transforms.models.checkpoints import UNSUPPORTED_FAMILIES, image_to_image_family
from tiny_families import FAMILIES
from tiny_models import NATIVE

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
NATIVE_FAMILIES = {"stable-diffusion": "sd1", "stable-diffusion-xl": "sdxl", "lcm": "lcm"}


def table() -> dict[str, tuple[str, str, str]]:
    """Family -> (way, tested, remark)."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (yes|no) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (way, tested, remark) for name, way, tested, remark in rows}


def test_the_page_says_what_the_tests_do() -> None:
    rows = table()
    assert {name for name, (way, *_) in rows.items() if way == "native"} == set(NATIVE_FAMILIES)
    assert {name for name, (way, tested, _) in rows.items() if (way, tested) == ("adapter", "yes")} == set(FAMILIES)
    assert {name for name, (way, *_) in rows.items() if way == "refused"} == set(UNSUPPORTED_FAMILIES)
    assert all(len(remark) > 40 for _, tested, remark in rows.values() if tested == "no")


def test_no_family_of_diffusers_is_forgotten() -> None:
    import diffusers
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING as MAPPING

    if diffusers.__version__.startswith("0.42."):  # the version that the page names; others may lack a family
        assert set(table()) == set(MAPPING) | {"kolors"}  # which depends on sentencepiece
    forgotten = set(MAPPING) - set(table())
    assert not forgotten, f"diffusers has image-to-image families that docs/models.md does not name: {sorted(forgotten)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_miniatures_are_what_they_are_called(family: str) -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING as MAPPING

    if family not in MAPPING:
        pytest.skip(f"this version of diffusers has no {family}")
    pipeline = FAMILIES[family]()
    assert type(pipeline) is MAPPING[family]
    assert image_to_image_family(type(pipeline).__name__) == family
    assert NativeEngine.supports(pipeline) is not None


@pytest.mark.parametrize(("family", "model"), NATIVE_FAMILIES.items())
def test_the_native_families(family: str, model: str) -> None:
    pipeline = NATIVE[model]()
    assert image_to_image_family(type(pipeline).__name__) == family
    assert NativeEngine.supports(pipeline) is None


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("FluxPipeline", "flux"),
        ("StableDiffusionInpaintPipeline", "stable-diffusion"),
        ("KandinskyV22Pipeline", "kandinsky22"),
        ("PixArtAlphaPipeline", None),
        ("DDPMPipeline", None),
    ],
)
def test_a_pipeline_of_another_task_belongs_to_its_family(kind: str, family: str | None) -> None:
    assert image_to_image_family(kind) == family
