"""Attention: SDPA by default, xFormers only where a real kernel has been seen to run."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny_models
from sgid_transforms.errors import GenerationError
from sgid_transforms.models import attention
from sgid_transforms.models.attention import apply_attention, probe_xformers


@pytest.fixture
def no_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)


def install(monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None, kernel: Any = None) -> None:
    """A stand-in for the package, as it looks after an import."""
    package = types.ModuleType("xformers")
    package.__version__ = "0.0.35"  # type: ignore[attr-defined]
    library, ops = types.ModuleType("xformers._cpp_lib"), types.ModuleType("xformers.ops")
    library._cpp_library_load_exception = failure  # type: ignore[attr-defined]
    ops.memory_efficient_attention = kernel  # type: ignore[attr-defined]
    package._cpp_lib, package.ops = library, ops  # type: ignore[attr-defined]
    for module in (package, library, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over (B, M, H, K), as xFormers lays it out."""
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def test_auto_leaves_sdpa_in_place() -> None:
    pipeline = tiny_models.sd1()
    apply_attention(pipeline, "auto")
    assert {type(processor).__name__ for processor in pipeline.unet.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.usefixtures("no_xformers")
def test_xformers_that_is_not_installed() -> None:
    with pytest.raises(GenerationError, match=r"^attention 'xformers' cannot be used: it is not installed .*'auto'$"):
        apply_attention(None, "xformers", "cuda")


def test_xformers_that_was_built_for_another_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, failure=OSError("undefined symbol"))
    reason = f"it is built for another PyTorch than {torch.__version__}, so its kernels do not load"
    assert probe_xformers("cuda") == reason


def test_xformers_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("operator exists already")

    monkeypatch.setitem(sys.modules, "xformers", Broken("xformers"))
    assert probe_xformers("cuda") == "it cannot be imported (RuntimeError: operator exists already)"


def test_xformers_on_a_cpu() -> None:
    assert probe_xformers("cpu") == "xFormers has kernels for CUDA devices only, not for cpu"


def no_operator(*_: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("No operator found")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (own, "None"),
        (lambda q, k, v: own(q, k, v) * 2, r"its kernel differs from PyTorch's attention by \d.* on cuda"),
        (lambda q, k, v: v * torch.nan, "its kernel differs from PyTorch's attention by nan on cuda"),
        (no_operator, r"its kernel does not run on cuda \(NotImplementedError\)"),
    ],
)
def test_a_kernel_must_run_and_agree(monkeypatch: pytest.MonkeyPatch, kernel: Any, reason: str) -> None:
    install(monkeypatch, kernel=kernel)
    difference = attention._difference_from_sdpa
    cpu = torch.device("cpu")  # stands in for the GPU
    monkeypatch.setattr(attention, "_difference_from_sdpa", lambda kernel, *_: difference(kernel, cpu, torch.float32))
    assert re.fullmatch(reason, str(probe_xformers("cuda")))


def test_a_pipeline_that_ignores_the_request_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "probe_xformers", lambda *a: None)
    pipeline = tiny_models.sd1()
    monkeypatch.setattr(pipeline, "enable_xformers_memory_efficient_attention", lambda: None)
    with pytest.raises(GenerationError, match=r"Img2ImgPipeline still uses AttnProcessor2_0; use attention='auto'$"):
        apply_attention(pipeline, "xformers")


def test_a_pipeline_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.attention_processor import XFormersAttnProcessor

    monkeypatch.setattr(attention, "probe_xformers", lambda *a: None)
    pipeline = tiny_models.sd1()
    switch = lambda: pipeline.unet.set_attn_processor(XFormersAttnProcessor())  # noqa: E731
    monkeypatch.setattr(pipeline, "enable_xformers_memory_efficient_attention", switch)
    apply_attention(pipeline, "xformers")


def test_the_probe_is_silent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """xFormers warns, logs and prints while it is imported; with warnings as errors that would end the program."""
    import warnings

    with attention._silenced():
        warnings.warn("built for another PyTorch", UserWarning, stacklevel=1)
        print("WARNING[XFORMERS]")
        print("details", file=sys.stderr)
    assert capfd.readouterr() == ("", "")
