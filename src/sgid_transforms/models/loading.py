"""From the name of a model to a diffusers pipeline that is ready to run: weights, attention, LoRA, memory, compilation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.attention import apply_attention
from sgid_transforms.models.checkpoints import check_pipeline_config, check_pipeline_folder, check_weights, resolve_model
from sgid_transforms.models.quiet import first_sentence, is_offline, quiet_loading

__all__ = ["compile_pipeline", "default_dtype", "denoiser", "load_pipeline", "padded_sizes", "resolve_model"]

_MAX_COMPILED_SHAPES = 8  # CUDA graphs warn past this many


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    local_files_only: bool | None = None,
    attention: str = "auto",
    tiny_vae: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
    controlnet: str | None = None,
    pag: bool = False,
    cpu_offload: bool = False,
) -> Any:
    """A diffusers image-to-image pipeline with its weights, on its device.

    Weights come from safetensors and nothing else, no code of a checkpoint is run, and a failure says in one sentence what
    is missing. Setting ``DIFFUSERS_DISABLE_REMOTE_CODE=1`` for this process is part of the call.

    Args:
        model: ``"tiny"`` (bundled), a local folder in diffusers' layout, or a hub id.
        revision: branch, tag or commit of a hub id.
        device: where the pipeline runs.
        dtype: dtype of the weights; ``None``: `default_dtype` of the device.
        variant: weights with a suffix, like ``"fp16"``; ``None``: half-precision dtypes take ``fp16`` files where there are
            any, which halves the download.
        local_files_only: never ask the hub; ``None``: only when ``HF_HUB_OFFLINE`` is set.
        attention: ``"auto"`` (PyTorch's SDPA) or ``"xformers"`` (after a probe has run a real kernel).
        tiny_vae: an `AutoencoderTiny` (folder or hub id, such as ``"madebyollin/taesd"``) in place of the VAE: faster, but it
            "fudges fine details".
        lora: LoRA weights to fuse into the model: a ``.safetensors`` file, a folder, or a hub id. Needs peft.
        lora_scale: weight of the LoRA.
        controlnet: a ControlNet (folder or hub id) to add; the picture itself is its control image.
        pag: use perturbed-attention guidance, where the family has it.
        cpu_offload: keep modules on the CPU and move each to the device while it runs; for accelerators with little memory.

    Raises:
        ModelLoadError: one sentence that names what is missing, or of what kind it is.
        GenerationError: xformers was asked for and cannot run here.
    """
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # read when diffusers is first imported
    from diffusers import AutoPipelineForImage2Image

    device = torch.device(device)
    dtype = default_dtype(device) if dtype is None else dtype
    offline = is_offline() if local_files_only is None else local_files_only
    source = resolve_model(model)
    if cpu_offload and device.type == "cpu":
        raise ModelLoadError("cpu_offload moves modules to an accelerator and back, but device is 'cpu'; leave it out")
    common: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": offline}
    with quiet_loading():
        if Path(source).is_dir():
            check_pipeline_folder(source)
        else:
            _check_hub_model(source, revision, offline)
        extra: dict[str, Any] = {"controlnet": _load_controlnet(controlnet, common)} if controlnet else {}
        if pag:
            extra["enable_pag"] = True
        try:
            pipeline = _from_pretrained(AutoPipelineForImage2Image, source, variant, common | extra | {"revision": revision})
        except Exception as error:
            raise _explain(error, source, offline) from error
        pipeline.set_progress_bar_config(disable=True)
        if tiny_vae is not None:
            _replace_vae(pipeline, tiny_vae, common)
        if lora is not None:
            _fuse_lora(pipeline, lora, lora_scale, offline)
        if not cpu_offload:
            pipeline.to(device)
    apply_attention(pipeline, attention, device, dtype)
    if cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def default_dtype(device: str | torch.device) -> torch.dtype:
    """float32 on a CPU; bfloat16 on an accelerator that has it, since VAEs overflow in float16; else float16."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def denoiser(pipeline: Any) -> Any:
    """The network that a pipeline calls at every step: its UNet or its transformer."""
    for name in ("unet", "transformer"):
        model = getattr(pipeline, name, None)
        if model is not None:
            return model
    raise ModelLoadError(f"{type(pipeline).__name__} has neither a UNet nor a transformer; choose another pipeline")


def compile_pipeline(pipeline: Any, *, backend: str = "inductor") -> str:
    """Compile the network's repeated blocks (regional compilation), or all of it where it has none.

    Regions compile several times faster than the whole and run as fast. Each batch size compiles once: pad batches to
    `padded_sizes`.

    Args:
        pipeline: a loaded pipeline; its modules are changed in place, and compile when they are first called.
        backend: a ``torch.compile`` backend.

    Returns:
        ``"regional"`` or ``"whole"``.
    """
    model = denoiser(pipeline)
    repeated = set(getattr(model, "_repeated_blocks", None) or ())
    if any(type(module).__name__ in repeated for module in model.modules()):
        model.compile_repeated_blocks(backend=backend)
        return "regional"
    model.compile(backend=backend)
    return "whole"


def padded_sizes(limit: int) -> list[int]:
    """Batch sizes to compile for: powers of two up to ``limit``, which is always among them; at most eight, the largest.

    >>> padded_sizes(12)
    [1, 2, 4, 8, 12]
    """
    sizes = [2**power for power in range(limit.bit_length()) if 2**power < limit]
    return [*sizes, limit][-_MAX_COMPILED_SHAPES:]


def _check_hub_model(source: str, revision: str | None, offline: bool) -> None:
    """Read the small ``model_index.json`` before gigabytes of weights are fetched."""
    from diffusers import DiffusionPipeline

    try:
        config = DiffusionPipeline.load_config(source, revision=revision, local_files_only=offline)
    except Exception as error:
        raise _explain(error, source, offline) from error
    check_pipeline_config(config, source)


def _from_pretrained(kind: Any, source: str, variant: str | None, options: dict[str, Any]) -> Any:
    if variant is None and options["torch_dtype"] in (torch.float16, torch.bfloat16) and _may_have_variant(source, "fp16"):
        try:
            return kind.from_pretrained(source, variant="fp16", **options)
        except (OSError, ValueError):  # no such files: the usual ones may well be there
            pass
    return kind.from_pretrained(source, variant=variant, **options)


def _may_have_variant(source: str, variant: str) -> bool:
    folder = Path(source)
    return not folder.is_dir() or any(folder.glob(f"*/*.{variant}*.safetensors"))


def _load_controlnet(source: str, common: dict[str, Any]) -> Any:
    from diffusers import AutoModel

    return _load_part(AutoModel, source, common, "ControlNet")


def _replace_vae(pipeline: Any, source: str, common: dict[str, Any]) -> None:
    from diffusers import AutoencoderTiny

    if getattr(pipeline, "vae", None) is None:
        raise ModelLoadError(f"{type(pipeline).__name__} has no VAE that tiny_vae {source!r} could stand in for; leave it out")
    tiny = _load_part(AutoencoderTiny, source, common, "tiny VAE")
    own = pipeline.vae.config.latent_channels
    if tiny.config.latent_channels != own:
        raise ModelLoadError(
            f"the tiny VAE {source!r} has {tiny.config.latent_channels} latent channels and the model {own}; "
            "choose the one made for this model"
        )
    factor = 2 ** (len(tiny.config.block_out_channels) - 1)
    if factor != pipeline.vae_scale_factor:
        raise ModelLoadError(f"the tiny VAE {source!r} scales by {factor} and the model by {pipeline.vae_scale_factor}")
    pipeline.register_modules(vae=tiny.eval())


def _load_part(kind: Any, source: str, common: dict[str, Any], name: str) -> Any:
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_weights(folder, f"the {name} in {folder}")
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else source, **common)
    except Exception as error:
        raise ModelLoadError(f"the {name} {source!r} cannot be loaded: {first_sentence(error)}") from error


def _fuse_lora(pipeline: Any, lora: str, scale: float, offline: bool) -> None:
    """Fuse LoRA weights into the model, so that they cost nothing at run time."""
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise ModelLoadError(f"the LoRA {lora!r} needs the package peft; install it with: pip install 'sgid-transforms[lora]'")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelLoadError(f"{type(pipeline).__name__} takes no LoRA; leave lora out")
    path = Path(lora).expanduser()
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
    source = lora
    if path.is_file():
        _check_lora_names(lora, [path.name])
        source, options["weight_name"] = str(path.parent), path.name
    elif path.is_dir():
        source = str(path)
        options["weight_name"] = _check_lora_names(lora, sorted(entry.name for entry in path.iterdir() if entry.is_file()))
    try:
        pipeline.load_lora_weights(source, **options)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    except Exception as error:
        raise ModelLoadError(f"the LoRA {lora!r} does not fit {type(pipeline).__name__}: {first_sentence(error)}") from error


def _check_lora_names(lora: str, names: Sequence[str]) -> str:
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise ModelLoadError(f"the LoRA folder {lora!r} holds {len(weights)} .safetensors files; give the path of one of them")
    found = names[0] if names else "nothing"
    raise ModelLoadError(f"the LoRA {lora!r} holds no .safetensors file (found {found}); pickled weights are never opened")


def _explain(error: Exception, source: str, offline: bool) -> ModelLoadError:
    """A loading error as one sentence that names what is missing."""
    from huggingface_hub import errors

    if isinstance(error, ModelLoadError):
        return error
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = str(error)
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return ModelLoadError(
            f"{source} asks for agreement to its licence first; accept it on the hub and log in with `hf auth login`"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return ModelLoadError(f"{source} has no such revision; give an existing branch, tag or commit")
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        return ModelLoadError(f"{source} is neither a local folder nor a public model on the hub; check the name, or log in")
    is_remote = not Path(source).is_dir()
    if is_remote and (
        offline or any(isinstance(e, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) for e in chain)
    ):
        return ModelLoadError(f"{source} is not in the local cache and the hub is out of reach; fetch it once while online")
    if "no file named" in text or "necessary `safetensors` weights" in text:
        return ModelLoadError(f"{source} has no safetensors weights for a part of it: {first_sentence(error)}")
    return ModelLoadError(f"{source} cannot be loaded: {first_sentence(error)}")
