"""Finds a checkpoint and checks that it can be used, before any of its weights are read.

All checks read JSON and file names only. Weights must be safetensors: a pickle can run code when it is opened, and so can a
custom pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgid_transforms.errors import ModelLoadError

TINY = "tiny"

_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Scheduler", "FeatureExtractor")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")

_WAY_OUT = "choose an image-to-image model such as stabilityai/sd-turbo"

UNSUPPORTED_FAMILIES: dict[str, str] = {
    "qwenimage-layered": "it splits an image into transparent layers instead of making a variant of it",
}
"""Families that diffusers lists as image-to-image and that this package refuses, with the reason."""


def resolve_model(model: str, part: str = "pipeline") -> str:
    """Where a model is: the bundled folder for ``"tiny"``, else the given folder or hub id.

    Args:
        model: ``"tiny"``, a local folder, or a hub id like ``"stabilityai/sd-turbo"``.
        part: Which bundled model is meant: ``pipeline``, ``clip`` or ``captioner``.

    Raises:
        ModelLoadError: The bundled model is not part of this installation, or the name cannot be a model.
    """
    if model == TINY:
        folder = Path(__file__).resolve().parent.parent / "assets" / "tiny" / part
        if not folder.is_dir():
            raise ModelLoadError(f"the bundled model {part!r} is missing from {folder}; reinstall sgid-transforms")
        return str(folder)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelLoadError(
            f"{model} is a single file; give a folder in diffusers' layout (from_single_file and save_pretrained make one)"
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model or not model.strip():
        raise ModelLoadError(f"the folder {model!r} does not exist; give an existing folder, 'tiny', or a hub id (owner/name)")
    return model


def check_pipeline_folder(folder: str | Path) -> None:
    """Raise `ModelLoadError` unless a local folder holds an image-to-image pipeline with safetensors weights only."""
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        found = "it holds weights of a single model" if (folder / "config.json").is_file() else "it is not in diffusers' layout"
        raise ModelLoadError(f"{folder} has no model_index.json ({found}); give a folder made by a pipeline's save_pretrained")
    config = read_json(index)
    check_pipeline_config(config, str(folder))
    for name, (library, kind) in sorted(components(config).items()):
        part = folder / name
        if not part.is_dir():
            raise ModelLoadError(f"{folder} has no folder {name!r} for the {kind} that its model_index.json names")
        if (part / f"{library}.py").is_file():
            raise ModelLoadError(f"{folder} needs custom code ({name}/{library}.py), which is never run")
        if not kind.endswith(_WEIGHTLESS):
            check_weights(part, f"{name} of {folder}")
        if name == "unet" and (part / "config.json").is_file():
            check_unet(read_json(part / "config.json"), str(folder))


def check_weights(folder: Path, name: str) -> None:
    """Raise `ModelLoadError` if a folder holds a model's config, but no safetensors weights beside it."""
    if not (folder / "config.json").is_file():  # a part without weights
        return
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelLoadError(
            f"{name} has only pickled weights ({pickles[0]}), which can run code when opened; "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    raise ModelLoadError(f"{name} has no weights; a .safetensors file is missing")


def check_pipeline_config(config: Mapping[str, Any], name: str) -> str:
    """The family of an image-to-image pipeline, from its ``model_index.json``.

    Raises:
        ModelLoadError: It is not an image-to-image pipeline, or it needs custom code.
    """
    kind = config.get("_class_name")
    if isinstance(kind, list):
        raise ModelLoadError(
            f"{name} is a custom pipeline ({kind[-1]}), and custom code is never run; choose a pipeline of diffusers itself"
        )
    if not isinstance(kind, str):
        raise ModelLoadError(f"{name} names no pipeline class in its model_index.json; give a folder made by save_pretrained")
    family = image_to_image_family(kind)
    if family is None:
        raise ModelLoadError(
            f"{name} is a {kind}, which diffusers' AutoPipelineForImage2Image does not know; {_WAY_OUT}, or load a pipeline "
            "that takes an image and a prompt yourself and pass it as Generator.from_recipe(recipe, pipeline=...)"
        )
    if family in UNSUPPORTED_FAMILIES:
        raise ModelLoadError(f"{name} is a {kind}, which is not supported: {UNSUPPORTED_FAMILIES[family]}")
    return family


def check_unet(config: Mapping[str, Any], name: str) -> None:
    """Raise `ModelLoadError` if a UNet reads a mask or a second image beside the latents, which image-to-image lacks.

    Such a UNet has more input than output channels. Kandinsky's and IF's have fewer: they also predict variances.
    """
    read, written = config.get("in_channels") or 4, config.get("out_channels") or 4
    if read > written:
        kind = {9: "an inpainting checkpoint", 8: "an InstructPix2Pix checkpoint"}.get(read, "not an image-to-image checkpoint")
        raise ModelLoadError(f"{name} is {kind} (its UNet reads {read} channels and writes {written}); {_WAY_OUT}")


def image_to_image_family(class_name: str) -> str | None:
    """diffusers' name of the family that a pipeline class belongs to, if that family can turn images into images."""
    from diffusers.pipelines import auto_pipeline

    mappings = [
        getattr(auto_pipeline, f"{prefix}_{task}_PIPELINES_MAPPING", {})
        for task in ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT", "TEXT2IMAGE_DECODER", "IMAGE2IMAGE_DECODER", "INPAINT_DECODER")
        for prefix in ("AUTO", "_AUTO")
    ]
    known = auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING
    families = (family for mapping in mappings for family, kind in mapping.items() if kind.__name__ == class_name)
    return next((family for family in families if family in known), None)


def components(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Components that a ``model_index.json`` names, as (library, class); optional ones that are absent are left out."""
    found = {}
    for name, entry in config.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and None not in entry:
            found[name] = (str(entry[0]), str(entry[1]))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelLoadError: The file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ModelLoadError(f"{path} cannot be read ({error}); copy the checkpoint again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} is not a JSON object; copy the checkpoint again")
    return content


def first_sentence(error: BaseException) -> str:
    """The first line of an exception's text, for messages that must stay one sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
