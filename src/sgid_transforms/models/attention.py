"""Which attention code runs: PyTorch's own (SDPA), or xFormers where one of its kernels has been seen to run."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from sgid_transforms.errors import GenerationError

ATTENTION = ("auto", "xformers")


@dataclass(frozen=True)
class AttentionReport:
    """What attention does on a device.

    Args:
        device: the device that was looked at.
        effective: ``"sdpa"`` or ``"xformers"``: what the pipeline's processors use; ``"sdpa"`` without a pipeline.
        sdpa_backends: SDPA's backends that are switched on there; which one a call takes depends on its shapes.
        xformers: ``None`` if a real kernel ran, else the reason why it cannot be used.
        processors: how many attention layers of the pipeline use which processor class.
    """

    device: str
    effective: str
    sdpa_backends: tuple[str, ...]
    xformers: str | None
    processors: dict[str, int] = field(default_factory=dict)


def check_attention(attention: str) -> None:
    """Raise `GenerationError` for an unknown name."""
    if attention not in ATTENTION:
        raise GenerationError(f"attention {attention!r} is not known; use one of {', '.join(map(repr, ATTENTION))}")


def apply_attention(
    pipeline: Any, attention: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Make a pipeline use an attention implementation, or say why it cannot.

    Args:
        pipeline: a loaded diffusers pipeline.
        attention: ``"auto"`` leaves PyTorch's SDPA, diffusers' default, in place; ``"xformers"`` is used after a probe.
        device: where the pipeline runs.
        dtype: what it runs in; ``None``: float16 on an accelerator, float32 on a CPU.

    Raises:
        GenerationError: the name is unknown, xFormers cannot run there, or the pipeline did not take it.
    """
    check_attention(attention)
    if attention == "auto":
        return
    obstacle = probe_xformers(device, dtype)
    if obstacle:
        raise GenerationError(f"attention 'xformers' cannot be used: {obstacle}; use attention='auto'")
    pipeline.enable_xformers_memory_efficient_attention()
    processors = attention_processors(pipeline)
    # set_attention_backend and its kin can do nothing without an error: believe what the layers say.
    if not any("XFormers" in name for name in processors):
        raise GenerationError(
            f"attention 'xformers' was switched on, but {type(pipeline).__name__} still uses "
            f"{', '.join(processors) or 'its own code'}; use attention='auto'"
        )


def probe_xformers(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> str | None:
    """``None`` if one of xFormers' own kernels runs on a device and agrees with SDPA, else the reason why not.

    An installed xFormers says little: built for another PyTorch its extension does not load, and what remains of its
    operators are PyTorch's own.
    """
    device = torch.device(device)
    try:
        with _silenced():
            import xformers
            from xformers import _cpp_lib, ops
    except ImportError as error:
        return f"it is not installed ({error})"
    except Exception as error:
        return f"it cannot be imported ({type(error).__name__}: {error})"
    failure = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    if failure is not None:
        version = getattr(xformers, "__version__", "of unknown version")
        return f"xFormers {version} is built for another PyTorch than {torch.__version__}, so its kernels do not load"
    if device.type != "cuda":
        return f"xFormers has kernels for CUDA devices only, not for {device.type}"
    try:
        return _compare_with_sdpa(ops.memory_efficient_attention, device, dtype or torch.float16)
    except Exception as error:
        return f"its kernel does not run on {device} ({type(error).__name__})"


def describe_attention(device: str | torch.device = "cpu", pipeline: Any = None) -> AttentionReport:
    """What attention is in effect on a device, and for a pipeline if one is given."""
    device = torch.device(device)
    processors = attention_processors(pipeline) if pipeline is not None else {}
    effective = "xformers" if any("XFormers" in name for name in processors) else "sdpa"
    return AttentionReport(str(device), effective, _sdpa_backends(device), probe_xformers(device), processors)


def attention_processors(pipeline: Any) -> dict[str, int]:
    """How many attention layers of a pipeline's UNet or transformer use which processor class."""
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    return dict(Counter(type(processor).__name__ for processor in getattr(model, "attn_processors", {}).values()))


def _compare_with_sdpa(attention: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 64, 4, 64, generator=generator).to(device, dtype) for _ in range(3))
    with torch.no_grad():
        result = attention(query, key, value)
        heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        reference = F.scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2]).transpose(1, 2)
    difference = float((result.float() - reference.float()).abs().max())
    if not difference < 0.02:  # also catches NaN
        return f"its kernel differs from PyTorch's attention by {difference:.3g} on {device}"
    return None


def _sdpa_backends(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("flash", "math") if device.type == "cpu" else ("math",)
    settings: Any = torch.backends.cuda
    enabled = {
        "flash": settings.flash_sdp_enabled(),
        "cudnn": settings.cudnn_sdp_enabled(),
        "efficient": settings.mem_efficient_sdp_enabled(),
        "math": settings.math_sdp_enabled(),
    }
    return tuple(name for name, on in enabled.items() if on)


@contextmanager
def _silenced() -> Iterator[None]:
    """xFormers prints, logs and warns while it is imported; what matters of it is in the probe's answer."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
