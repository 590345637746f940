"""Loads a diffusers pipeline by its name and makes it ready to run: weights, attention, LoRA, memory, compilation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from sgid_transforms.errors import ModelLoadError
from sgid_transforms.models.attention import apply_attention, check_attention
from sgid_transforms.models.checkpoints import (
    check_pipeline_config,
    check_pipeline_folder,
    check_unet,
    components,
    first_sentence,
    resolve_model,
)

_MAX_GRAPHS = 8  # each takes time to record, and memory


def default_device() -> str:
    """The accelerator of this machine, whatever PyTorch supports, or ``"cpu"``; of several, that of this process."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else str(check_device(found))


def all_devices(names: Sequence[str]) -> list[str]:
    """The devices of these names, where ``"all"`` stands for every accelerator of this machine, or the CPU if there is none.

    Raises:
        ModelLoadError: There are no names, one is not a device, or this machine does not have it.
    """
    found: list[str] = []
    for name in names:
        kind = torch.accelerator.current_accelerator(check_available=True) if name == "all" else None
        if kind is not None:
            found += [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
        else:
            found.append("cpu" if name == "all" else str(check_device(name)))
    if not found:
        raise ModelLoadError("the list of devices is empty; give at least one, such as 'cuda:0', or 'all'")
    return found


def check_device(device: str | torch.device) -> torch.device:
    """The device of that name, if models can run there.

    A name without a number, such as ``"cuda"``, means the device of this process: the one that it has set, else that of
    ``LOCAL_RANK``, as torchrun sets it, or of ``SLURM_LOCALID``, else the first.

    Raises:
        ModelLoadError: The name is not a device, or this machine does not have it.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ModelLoadError(f"{device!r} is not a device; give cpu, cuda, cuda:1 or mps") from None
    try:  # any accelerator that PyTorch knows, including those of other packages
        backend: Any = torch.get_device_module(found)
    except RuntimeError:
        raise ModelLoadError(f"{str(found)!r} cannot run these models; give cpu, cuda or mps") from None
    if not backend.is_available():
        kind = found.type.upper()
        raise ModelLoadError(f"PyTorch {torch.__version__} sees no {kind} device; use the device cpu, or see `sgid doctor`")
    if found.type != "cpu" and (found.index or 0) >= backend.device_count():
        raise ModelLoadError(f"there is no device {str(found)!r}; PyTorch sees {backend.device_count()} of this kind")
    return torch.device(own_device(str(found)))


def own_device(name: str) -> str:
    """The name of a device with the number of this process's one, where there are several; any other name as it is."""
    kind, colon, _ = name.partition(":")
    if colon or kind == "cpu":
        return name
    try:
        backend: Any = torch.get_device_module(kind)
        several = backend.is_available() and backend.device_count() > 1
    except RuntimeError:
        return name
    return f"{kind}:{_own_index(backend)}" if several else name


def _own_index(backend: Any) -> int:
    if backend.is_initialized():  # asking sooner would initialize it, which breaks processes that are forked later
        return int(backend.current_device())
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "")
    return int(rank) if rank.isdecimal() and int(rank) < backend.device_count() else 0


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    local_files_only: bool | None = None,
    attention: str = "auto",
    lora: str | None = None,
    lora_scale: float = 1.0,
    cpu_offload: bool = False,
) -> Any:
    """Load a diffusers image-to-image pipeline and move it to its device.

    Only safetensors are read, and no code of a checkpoint is run. Whatever can be checked without weights is checked before
    they are read or downloaded.

    Args:
        model: ``"tiny"`` (bundled), a local folder in diffusers' layout, or a hub id.
        revision: Branch, tag or commit of a hub id.
        device: Where the pipeline runs.
        dtype: Data type of the weights; None: `default_dtype` of the device.
        variant: Suffix of the weight files, like ``"fp16"``; None: ``fp16`` files for half precision and plain ones for
            float32 where both exist, else whichever exist.
        local_files_only: Never ask the hub; None: only when ``HF_HUB_OFFLINE`` is set.
        attention: ``"auto"`` (PyTorch's SDPA) or ``"xformers"`` (after a probe has run a real kernel).
        lora: LoRA weights to fuse into the model: a ``.safetensors`` file, a folder, or a hub id. Needs peft.
        lora_scale: Weight of the LoRA.
        cpu_offload: Keep modules on the CPU and move each to the device while it runs, for accelerators with little memory.

    Raises:
        ModelLoadError: The model cannot be used; the message says why.
        GenerationError: xFormers was asked for and cannot run here.

    Examples:
        >>> pipeline = load_pipeline("tiny")
        >>> type(pipeline).__name__
        'StableDiffusionImg2ImgPipeline'
    """
    device = check_device(device)
    if not isinstance(dtype, torch.dtype | None):
        raise ModelLoadError(f"dtype is {dtype!r}; pass a torch.dtype, such as torch.float16")
    dtype = default_dtype(device) if dtype is None else dtype
    offline = is_offline() if local_files_only is None else local_files_only
    if cpu_offload and device.type == "cpu":
        raise ModelLoadError("cpu_offload moves modules to an accelerator and back, but device is 'cpu'; leave it out")
    check_attention(attention, device, dtype)
    source = check_model(model, revision=revision, local_files_only=offline)
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": offline, "revision": revision}
    with quiet():
        try:
            pipeline = _from_pretrained(source, variant, options)
        except Exception as error:
            raise _explain(error, source, offline) from error
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            _fuse_lora(pipeline, lora, lora_scale, offline)
        if not cpu_offload:
            pipeline.to(device)
    apply_attention(pipeline, attention, device, dtype)
    if cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def check_model(model: str, *, revision: str | None = None, local_files_only: bool | None = None) -> str:
    """Refuse a model that is not image-to-image, by its small JSON files alone; returns its folder or hub id.

    Raises:
        ModelLoadError: The model is refused; the message says why, and what to do.
    """
    source = resolve_model(model)
    with quiet():
        if Path(source).is_dir():
            check_pipeline_folder(source)
            return source
        from diffusers import DiffusionPipeline, UNet2DConditionModel

        offline = is_offline() if local_files_only is None else local_files_only
        options: dict[str, Any] = {"revision": revision, "local_files_only": offline}
        try:
            config = DiffusionPipeline.load_config(source, **options)
            check_pipeline_config(config, source)
            if "unet" in components(config):
                check_unet(UNet2DConditionModel.load_config(source, subfolder="unet", **options), source)
        except Exception as error:
            raise _explain(error, source, offline) from error
    return source


def default_dtype(device: str | torch.device) -> torch.dtype:
    """float32 on a CPU; bfloat16 on an accelerator that has it, since VAEs overflow in float16; else float16."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.float32
    # Before Ampere (V100, T4) bfloat16 is emulated, and slow.
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def is_offline() -> bool:
    """Whether huggingface_hub was told to stay offline (``HF_HUB_OFFLINE=1``)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and everything but errors from diffusers and transformers; restores the user's settings afterwards.

    Downloads keep their progress bars: those come from huggingface_hub, and a wait of minutes should be visible. This is
    also where diffusers may first be imported, so remote code is switched off here, for the whole process.
    """
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils
    from transformers.utils import logging as transformers_logging

    hub: Any = utils
    with ExitStack() as stack:
        # Ignore deprecated calls between these libraries.
        stack.enter_context(warnings.catch_warnings())
        message = r"[\s\S]*is deprecated and will be removed in version"
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated", category=UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(diffusers|transformers|torch|numpy)(\.|$)")
        # transformers switches the hub's bars together with its own; if HF_HUB_DISABLE_PROGRESS_BARS is set, the hub warns.
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars", category=UserWarning)
        set_downloads = hub.disable_progress_bars if hub.are_progress_bars_disabled() else hub.enable_progress_bars
        stack.callback(set_downloads)
        for logging in (diffusers_logging, transformers_logging):
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity_error()
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        set_downloads()
        yield


def denoiser(pipeline: Any) -> Any:
    """The network that a pipeline calls at every step: its UNet or its transformer."""
    for name in ("unet", "transformer"):
        model = getattr(pipeline, name, None)
        if model is not None:
            return model
    raise ModelLoadError(f"{type(pipeline).__name__} has neither a UNet nor a transformer; choose another pipeline")


def compile_pipeline(pipeline: Any, *, mode: str | None = None, backend: str = "inductor") -> str:
    """Compile the network's repeated blocks (regional compilation), or all of it if it has none.

    Regions compile several times faster than the whole and run just as fast. Batches of all sizes share their code
    (``dynamic=True``), except for batches of one; only where `records_graphs` is it better to pad them to `padded_sizes`.

    Args:
        pipeline: A loaded pipeline; its modules are changed in place, and compile when they are first called.
        mode: A mode of ``torch.compile``, such as ``"reduce-overhead"`` or ``"max-autotune"``; None: its default.
        backend: A ``torch.compile`` backend.

    Returns:
        ``"regional"`` or ``"whole"``.

    Raises:
        ModelLoadError: ``torch.compile`` has no such mode.
    """
    model = denoiser(pipeline)
    repeated = set(getattr(model, "_repeated_blocks", None) or ())
    regional = any(type(module).__name__ in repeated for module in model.modules())
    try:
        (model.compile_repeated_blocks if regional else model.compile)(backend=backend, mode=mode, dynamic=True)
    except RuntimeError as error:
        raise ModelLoadError(f"the model cannot be compiled with mode {mode!r}: {first_sentence(error)}") from error
    return "regional" if regional else "whole"


def records_graphs(mode: str | None) -> bool:
    """Whether a mode of ``torch.compile`` records a CUDA graph for each size of a batch."""
    return mode in ("reduce-overhead", "max-autotune")


def padded_sizes(limit: int) -> list[int]:
    """Batch sizes to record graphs of: ``limit`` and the powers of two below it, at most the eight largest.

    Examples:
        >>> padded_sizes(12)
        [1, 2, 4, 8, 12]
    """
    sizes = [2**power for power in range(limit.bit_length()) if 2**power < limit]
    return [*sizes, limit][-_MAX_GRAPHS:]


def _from_pretrained(source: str, variant: str | None, options: dict[str, Any]) -> Any:
    """Load the pipeline with the weight files of a variant, or with the existing ones that suit the dtype best."""
    from diffusers import AutoPipelineForImage2Image

    suffixes = [variant]
    if variant is None:
        suffixes = [None, "fp16"] if options["torch_dtype"] == torch.float32 else ["fp16", None]
    errors: dict[str | None, Exception] = {}
    for suffix in suffixes:
        try:
            return AutoPipelineForImage2Image.from_pretrained(source, variant=suffix, **options)
        except (OSError, ValueError, IndexError) as error:  # IndexError: a file without a suffix beside the weights
            errors[suffix] = error
    raise errors[variant]


def _fuse_lora(pipeline: Any, lora: str, scale: float, offline: bool) -> None:
    """Fuse LoRA weights into the model, so that they cost nothing at run time."""
    from diffusers.utils import is_peft_available

    if not is_peft_available():
        raise ModelLoadError(f"the LoRA {lora!r} needs the package peft; install it with: pip install 'sgid-transforms[lora]'")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelLoadError(f"{type(pipeline).__name__} takes no LoRA; leave lora out")
    path, source = Path(lora).expanduser(), lora
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": offline}
    if path.exists():
        file = _lora_file(lora, path)
        source, options["weight_name"] = str(file.parent), file.name
    try:
        pipeline.load_lora_weights(source, **options)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    except Exception as error:
        raise ModelLoadError(f"the LoRA {lora!r} does not fit {type(pipeline).__name__}: {first_sentence(error)}") from error


def _lora_file(lora: str, path: Path) -> Path:
    """The safetensors file at a path, or the only one in a folder."""
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    if len(weights) > 1:
        raise ModelLoadError(f"the LoRA folder {lora!r} holds {len(weights)} .safetensors files; give the path of one of them")
    if not weights:
        found = files[0].name if files else "nothing"
        raise ModelLoadError(f"the LoRA {lora!r} holds no .safetensors file (found {found}); pickled weights are never opened")
    return weights[0]


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

    def is_due_to(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    text = str(error)
    if is_due_to(errors.GatedRepoError):
        why = "requires agreement to its licence first; accept it on the hub and log in with `hf auth login`"
    elif is_due_to(errors.RevisionNotFoundError):
        why = "has no such revision; give an existing branch, tag or commit"
    elif is_due_to(errors.RepositoryNotFoundError):
        why = "is neither a local folder nor a public model on the hub; check the name, or log in"
    elif not Path(source).is_dir() and (offline or is_due_to(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        why = "is not in the local cache and the hub is out of reach; fetch it once while online"
    elif "no file named" in text or "necessary `safetensors` weights" in text:
        why = (
            f"has no safetensors weights for a part of it ({first_sentence(error)}); if their names have a suffix, "
            "as in diffusion_pytorch_model.bf16.safetensors, pass variant='bf16'"
        )
    else:
        why = f"cannot be loaded: {first_sentence(error)}"
    return ModelLoadError(f"{source} {why}")
