"""Attention: SDPA by default, xFormers only where a real kernel has been seen to run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import tiny_families
import tiny_models
import torch
from torch.nn import functional as F

from sgid_transforms.errors import GenerationError
from sgid_transforms.models import attention
from sgid_transforms.models.attention import apply_attention, attention_processors, describe_attention, probe_xformers


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
    before = attention_processors(pipeline)
    apply_attention(pipeline, "auto")
    assert attention_processors(pipeline) == before == {"AttnProcessor2_0": 8}
    assert set(attention_processors(tiny_families.flux())) == {"FluxAttnProcessor"}


@pytest.mark.usefixtures("no_xformers")
def test_xformers_that_is_not_installed() -> None:
    with pytest.raises(GenerationError, match=r"^attention 'xformers' cannot be used: it is not installed .*'auto'$"):
        apply_attention(tiny_models.sd1(), "xformers")


def test_xformers_that_was_built_for_another_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, failure=OSError("undefined symbol"))
    reason = probe_xformers("cuda")
    assert reason is not None
    assert reason.startswith(f"xFormers 0.0.35 is built for another PyTorch than {torch.__version__}")


def test_xformers_that_breaks_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("operator exists already")

    monkeypatch.setitem(sys.modules, "xformers", Broken("xformers"))
    assert probe_xformers("cuda") == "it cannot be imported (RuntimeError: operator exists already)"


def test_xformers_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, kernel=own)
    assert probe_xformers("cpu") == "xFormers has kernels for CUDA devices only, not for cpu"


def test_a_kernel_must_run_and_agree() -> None:
    cpu = torch.device("cpu")
    assert attention._compare_with_sdpa(own, cpu, torch.float32) is None
    wrong = attention._compare_with_sdpa(lambda q, k, v: own(q, k, v) * 2, cpu, torch.float32)
    assert wrong is not None
    assert wrong.startswith("its kernel differs from PyTorch's attention by ")
    assert "nan" in str(attention._compare_with_sdpa(lambda q, k, v: v * torch.nan, cpu, torch.float32))


def test_a_kernel_that_raises_is_an_answer_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any) -> None:
        raise NotImplementedError("No operator found")

    install(monkeypatch, kernel=kernel)
    monkeypatch.setattr(attention.torch, "randn", lambda *a, **k: torch.zeros(2, 64, 4, 64, device="meta"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: self)
    assert probe_xformers("cuda") == "its kernel does not run on cuda (NotImplementedError)"


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
    report = describe_attention("cpu", pipeline)
    assert report.effective == "xformers"
    assert report.processors == {"XFormersAttnProcessor": 8}


@pytest.mark.usefixtures("no_xformers")
def test_the_report() -> None:
    report = describe_attention("cpu")
    assert report.device == "cpu"
    assert report.effective == "sdpa"
    assert "math" in report.sdpa_backends
    assert "not installed" in str(report.xformers)
    assert report.processors == {}
    with_pipeline = describe_attention(torch.device("cpu"), tiny_models.sd1())
    assert with_pipeline.processors == {"AttnProcessor2_0": 8}
    assert with_pipeline.effective == "sdpa"


def test_the_probe_is_silent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """xFormers warns, logs and prints while it is imported; with warnings as errors that would end the program."""
    import warnings

    with attention._silenced():
        warnings.warn("built for another PyTorch", UserWarning, stacklevel=1)
        print("WARNING[XFORMERS]")
        print("details", file=sys.stderr)
    assert capfd.readouterr() == ("", "")
