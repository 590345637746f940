"""Choice of attention: PyTorch's own (SDPA), or xFormers if a probe has run one of its kernels."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch.nn import functional as F

from sgid_transforms.errors import GenerationError

ATTENTION = ("auto", "xformers")


def check_attention(attention: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
    """Raise `GenerationError` if an attention's name is unknown, or if xFormers was asked for and cannot run on the device."""
    if attention not in ATTENTION:
        raise GenerationError(f"attention {attention!r} is not known; use one of {', '.join(map(repr, ATTENTION))}")
    obstacle = probe_xformers(device, dtype) if attention == "xformers" else None
    if obstacle:
        raise GenerationError(f"attention 'xformers' cannot be used: {obstacle}; use attention='auto'")


def apply_attention(
    pipeline: Any, attention: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Make a loaded pipeline use ``"auto"`` (PyTorch's SDPA, diffusers' default) or ``"xformers"``.

    Raises:
        GenerationError: `check_attention` refuses it, or the pipeline ignores it.
    """
    check_attention(attention, device, dtype)
    if attention == "auto":
        return
    pipeline.enable_xformers_memory_efficient_attention()
    # diffusers may silently do nothing here, so check the layers.
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    names = sorted({type(processor).__name__ for processor in getattr(model, "attn_processors", {}).values()})
    if not any("XFormers" in name for name in names):
        used = ", ".join(names) or "its own code"
        raise GenerationError(
            f"attention 'xformers' was switched on, but {type(pipeline).__name__} still uses {used}; use attention='auto'"
        )


def probe_xformers(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> str | None:
    """None if one of xFormers' own kernels runs on a device and agrees with SDPA, else the reason why not."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"xFormers has kernels for CUDA devices only, not for {device.type}"
    try:
        with _silenced():
            from xformers import _cpp_lib, ops
    except ImportError as error:
        return f"it is not installed ({error})"
    except Exception as error:
        return f"it cannot be imported ({type(error).__name__}: {error})"
    # A build for another PyTorch can be imported and even runs, but with PyTorch's own operators.
    if getattr(_cpp_lib, "_cpp_library_load_exception", None) is not None:
        return f"it is built for another PyTorch than {torch.__version__}, so its kernels do not load"
    try:
        difference = _difference_from_sdpa(ops.memory_efficient_attention, device, dtype or torch.float16)
    except Exception as error:
        return f"its kernel does not run on {device} ({type(error).__name__})"
    if not difference < 0.02:  # also catches NaN
        return f"its kernel differs from PyTorch's attention by {difference:.3g} on {device}"
    return None


def _difference_from_sdpa(attention: Any, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between PyTorch's attention and one over ``(batch, tokens, heads, width)``."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 64, 4, 64, generator=generator).to(device, dtype) for _ in range(3)]
    with torch.no_grad():
        query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
        reference = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return float((attention(*inputs).float() - reference.float()).abs().max())


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide what xFormers prints, logs and warns on import; the probe reports what matters."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
