"""From a name to a pipeline: what is loaded, and the one sentence for everything that cannot be."""

from __future__ import annotations

import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_families
import tiny_models
from sgid_transforms.errors import GenerationError, ModelLoadError
from sgid_transforms.models import checkpoints, loading
from sgid_transforms.models.checkpoints import check_unet
from sgid_transforms.models.loading import (
    check_device,
    compile_pipeline,
    default_device,
    default_dtype,
    denoiser,
    load_pipeline,
    own_device,
    padded_sizes,
    quiet,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion checkpoint in diffusers' layout."""
    folder = tmp_path_factory.mktemp("checkpoint") / "sd1"
    tiny_models.sd1().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_as_an_image_to_image_pipeline(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = load_pipeline(str(saved))
    assert type(pipeline).__name__ == "StableDiffusionImg2ImgPipeline"
    original = tiny_models.sd1().unet.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipeline.unet.state_dict().items())
    assert pipeline.unet.dtype == torch.float32
    assert os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"]
    assert capfd.readouterr() == ("", "")  # neither progress bars nor remarks


def test_loading_keeps_the_log_settings_of_the_user(saved: Path) -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_pipeline(str(saved))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("wanted", [True, False])
def test_downloads_keep_their_progress_bars(wanted: bool) -> None:
    """transformers switches the hub's bars off together with its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    before = are_progress_bars_disabled(), logging.is_progress_bar_enabled()  # whatever other tests left
    logging.enable_progress_bar()  # the hub's as well
    (enable_progress_bars if wanted else disable_progress_bars)()
    try:
        with quiet():
            assert are_progress_bars_disabled() is not wanted
            assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is not wanted
        assert logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
        (disable_progress_bars if before[0] else enable_progress_bars)()


def test_dtype_reaches_the_weights(saved: Path) -> None:
    assert load_pipeline(str(saved), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert default_dtype("cpu") == torch.float32


def test_accelerators_of_other_packages_are_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match="cannot run these models"):
        check_device("hpu")
    backend = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    monkeypatch.setattr(torch, "hpu", backend, raising=False)
    assert check_device("hpu:0") == torch.device("hpu:0")
    with pytest.raises(ModelLoadError, match="there is no device 'hpu:1'; PyTorch sees 1 of this kind"):
        check_device("hpu:1")
    backend.is_available = lambda: False
    with pytest.raises(ModelLoadError, match="sees no HPU device"):
        check_device("hpu")


def test_emulated_bfloat16_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 has it in software only, which `is_bf16_supported()` counts."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert default_dtype("cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert default_dtype("cuda") == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "native", "dtype"),
    [
        ("cuda:1", False, torch.float16),
        (torch.device("cuda", 0), False, torch.float16),
        ("cuda", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("xpu", False, torch.bfloat16),  # CUDA's answer says nothing about others
    ],
)
def test_precision_by_device(monkeypatch: pytest.MonkeyPatch, device: Any, native: bool, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert default_dtype(device) == dtype


def test_half_precision_prefers_fp16_files(saved: Path, tmp_path: Path) -> None:
    pipeline = tiny_models.sd1()
    pipeline.unet.conv_in.bias.data.fill_(7.0)
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    for folder in ("unet", "vae", "text_encoder"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    for dtype in (torch.float16, torch.float32):  # also where there are no other files
        loaded = load_pipeline(str(tmp_path), dtype=dtype)
        assert float(loaded.unet.conv_in.bias[0].detach()) == 7.0
        assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    for path in (tmp_path / "unet").glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".fp16.", ".ema.")))
    with pytest.raises(
        ModelLoadError, match=r"^.* has no safetensors weights for a part of it \(.*\); .* pass variant='bf16'$"
    ):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("parts", [("unet",), ("text_encoder",), ("vae", "text_encoder")])
def test_a_pipeline_of_which_some_parts_have_only_fp16_files_loads(saved: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for part in parts:
        for path in (tmp_path / part).glob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    for dtype in (torch.float16, torch.float32):
        loaded = load_pipeline(str(tmp_path), dtype=dtype)
        assert loaded.unet.dtype == loaded.vae.dtype == dtype


def test_a_text_to_image_checkpoint_of_another_family_becomes_image_to_image(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    FluxPipeline(**tiny_families._flux_parts()).save_pretrained(tmp_path, safe_serialization=True)
    assert type(load_pipeline(str(tmp_path))).__name__ == "FluxImg2ImgPipeline"


def test_a_saved_controlnet_or_pag_pipeline_stays_what_it_is(tmp_path: Path) -> None:
    for family in ("stable-diffusion-controlnet", "stable-diffusion-pag"):
        pipeline = tiny_families.FAMILIES[family]()
        pipeline.save_pretrained(tmp_path / family, safe_serialization=True)
        assert type(load_pipeline(str(tmp_path / family))) is type(pipeline)


def remove_weights(folder: Path) -> None:
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()


def pickle_weights(folder: Path) -> None:
    remove_weights(folder)
    # A pickle that would leave a trace if it were opened.
    trap = b"cposix\nsystem\n(S'touch " + str(folder / "opened").encode() + b"'\ntR."
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(trap)


def remove_part(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def remove_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def single_model(folder: Path) -> None:
    remove_index(folder)
    shutil.copy(folder / "unet" / "config.json", folder)


def damage_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def deep_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("[" * 100_000)


def no_text_index(folder: Path) -> None:
    (folder / "model_index.json").write_bytes(b"\xff\xfe")


def name_a_list(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def custom_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    (folder / "pipeline.py").write_text(f"open({str(folder / 'opened')!r}, 'w')")


def custom_component(folder: Path) -> None:
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    (folder / "unet" / "my_unet.py").write_text(f"open({str(folder / 'opened')!r}, 'w')")


def unconditional(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="DDPMPipeline")


def layered(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="QwenImageLayeredPipeline")


def reads(channels: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "unet" / "config.json", in_channels=channels)


def inpainting(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    reads(9)(folder)


def flux_fill(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxFillPipeline")


def no_class(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name=None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, r"^unet of .*broken has no weights; a .safetensors file is missing$"),
        (
            pickle_weights,
            r"^unet of .*broken has only pickled weights \(diffusion_pytorch_model.bin\), which can run code",
        ),
        (remove_part, r"^.*broken has no folder 'vae' for the AutoencoderKL that its model_index.json names$"),
        (deep_index, r"^.*model_index.json cannot be read \(.*\); copy the checkpoint again$"),
        (no_text_index, r"^.*model_index.json cannot be read \(.*\); copy the checkpoint again$"),
        (remove_index, r"^.*broken has no model_index.json \(it is not in diffusers' layout\); give a folder made by a"),
        (single_model, r"^.*broken has no model_index.json \(it holds weights of a single model\); give a folder"),
        (damage_index, r"^.*model_index.json cannot be read \(.*\); copy the checkpoint again$"),
        (name_a_list, r"^.*model_index.json is not a JSON object; copy the checkpoint again$"),
        (
            custom_pipeline,
            r"^.*broken is a custom pipeline \(MyPipeline\), and custom code is never run; choose a",
        ),
        (custom_component, r"^.*broken needs custom code \(unet/my_unet.py\), which is never run$"),
        (unconditional, r"^.*broken is a DDPMPipeline, which diffusers' AutoPipelineForImage2Image does not know; choose an"),
        (flux_fill, r"^.*broken is a FluxFillPipeline, which diffusers' AutoPipelineForImage2Image does not know; choose an"),
        (inpainting, r"^.*broken is an inpainting checkpoint \(its UNet reads 9 channels and writes 4\); choose an image-to-"),
        (reads(9), r"^.*broken is an inpainting checkpoint \(its UNet reads 9 channels and writes 4\); choose an image-to-"),
        (reads(8), r"^.*broken is an InstructPix2Pix checkpoint \(its UNet reads 8 channels and writes 4\); choose an"),
        (reads(5), r"^.*broken is not an image-to-image checkpoint \(its UNet reads 5 channels and writes 4\); choose an"),
        (layered, r"^.*broken is a QwenImageLayeredPipeline, which is not supported: it splits an image into transparent"),
        (no_class, r"^.*broken names no pipeline class in its model_index.json; give a folder made by save_pretrained$"),
    ],
)
def test_what_cannot_be_loaded_is_named_in_one_sentence(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_pipeline(str(checkpoint))
    assert "\n" not in str(caught.value)
    assert not (checkpoint / "opened").exists()  # nothing of it was run


def test_an_inpainting_pipeline_with_a_plain_unet_is_loaded(checkpoint: Path) -> None:
    edit(checkpoint / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    assert type(load_pipeline(str(checkpoint))).__name__ == "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize("family", ["if", "kandinsky22"])
def test_a_unet_that_also_writes_variances_is_fine(family: str) -> None:
    check_unet(tiny_families.FAMILIES[family]().unet.config, family)


def test_a_tokenizer_needs_no_weights(checkpoint: Path) -> None:
    """Processors of some checkpoints bring a model's config.json along."""
    shutil.copy(checkpoint / "text_encoder" / "config.json", checkpoint / "tokenizer")
    assert load_pipeline(str(checkpoint)).tokenizer is not None


def test_weights_that_do_not_fit_their_config(checkpoint: Path) -> None:
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelLoadError, match=r"^.*broken cannot be loaded: .*") as caught:
        load_pipeline(str(checkpoint))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "./not/there",
            r"^the folder './not/there' does not exist; give an existing folder, 'tiny', or a hub id",
        ),
        ("/not/there", r"^the folder '/not/there' does not exist"),
        ("a/b/c", r"^the folder 'a/b/c' does not exist"),
        ("someone/something", r"^someone/something is not in the local cache and the hub is out of reach; fetch it once while"),
    ],
)
def test_names_that_lead_nowhere(model: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_pipeline(model, local_files_only=True)


def test_a_single_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"model.safetensors is a single file; give a folder in diffusers' layout"):
        checkpoints.resolve_model(str(file))


def test_tiny_is_the_bundled_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "models" / "checkpoints.py"))
    with pytest.raises(ModelLoadError, match=r"^the bundled model 'clip' is missing from .*; reinstall sgid-transforms$"):
        checkpoints.resolve_model("tiny", "clip")
    (tmp_path / "assets" / "tiny" / "clip").mkdir(parents=True)
    assert checkpoints.resolve_model("tiny", "clip") == str(tmp_path / "assets" / "tiny" / "clip")
    assert checkpoints.resolve_model("stabilityai/sd-turbo") == "stabilityai/sd-turbo"


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    error: Exception = getattr(errors, kind).__new__(getattr(errors, kind))
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "GatedRepoError",
            r"^a/b requires agreement to its licence first; accept it on the hub and",
        ),
        ("RevisionNotFoundError", r"^a/b has no such revision; give an existing branch, tag or commit$"),
        (
            "RepositoryNotFoundError",
            r"^a/b is neither a local folder nor a public model on the hub; check the name",
        ),
        ("LocalEntryNotFoundError", r"^a/b is not in the local cache and the hub is out of reach; fetch it once while online$"),
    ],
)
def test_hub_errors_become_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    from diffusers import DiffusionPipeline

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("several\nlines") from hub_error(kind)

    monkeypatch.setattr(DiffusionPipeline, "load_config", fail)
    with pytest.raises(ModelLoadError, match=message):
        load_pipeline("a/b", local_files_only=False)


def test_a_hub_model_is_refused_before_its_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, UNet2DConditionModel

    asked: list[dict[str, Any]] = []
    index: dict[str, Any] = {"_class_name": "DDPMPipeline"}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *a, **k: asked.append(k) or index)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lambda *a, **k: asked.append(k) or {"in_channels": 9})
    monkeypatch.setattr(AutoPipelineForImage2Image, "from_pretrained", lambda *a, **k: pytest.fail("weights were fetched"))
    with pytest.raises(ModelLoadError, match=r"^a/b is a DDPMPipeline, which diffusers' AutoPipelineForImage2Image does not"):
        load_pipeline("a/b", revision="v1", local_files_only=False)
    assert asked == [{"revision": "v1", "local_files_only": False}]
    index |= {"_class_name": "StableDiffusionInpaintPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    with pytest.raises(ModelLoadError, match=r"^a/b is an inpainting checkpoint \(its UNet reads 9 channels and writes 4\);"):
        load_pipeline("a/b", revision="v1", local_files_only=False)
    assert asked[-1] == {"revision": "v1", "local_files_only": False, "subfolder": "unet"}


def test_hub_options_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

    calls: list[dict[str, Any]] = []

    def from_pretrained(source: str, **options: Any) -> Any:
        calls.append({"source": source} | options)
        if options["variant"] == "fp16":
            raise OSError("no file named diffusion_pytorch_model.fp16.safetensors")
        return tiny_models.sd1()

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *a, **k: {"_class_name": "StableDiffusionPipeline"})
    monkeypatch.setattr(AutoPipelineForImage2Image, "from_pretrained", from_pretrained)
    load_pipeline("a/b", revision="v1", dtype=torch.float16, local_files_only=False)
    assert [call["variant"] for call in calls] == ["fp16", None]  # the smaller files first, then the usual ones
    for call in calls:
        assert call["use_safetensors"] is True
        assert call["revision"] == "v1"
        assert call["local_files_only"] is False
        assert not {"custom_pipeline", "trust_remote_code"} & set(call)


def test_lora_is_fused_from_safetensors_only(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = load_pipeline(str(saved))
    name = next(key for key in plain.unet.state_dict() if key.endswith("attn1.to_q.weight")).removesuffix(".weight")
    before = plain.unet.state_dict()[f"{name}.weight"]
    width = before.shape[0]
    down, up = torch.ones(1, width), torch.ones(width, 1)
    folder = tmp_path / "lora"
    folder.mkdir()
    weights = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    for source in (folder, folder / "pytorch_lora_weights.safetensors"):
        fused = load_pipeline(str(saved), lora=str(source), lora_scale=0.5)
        torch.testing.assert_close(fused.unet.state_dict()[f"{name}.weight"], before + 0.5)
    save_file(weights, folder / "another.safetensors")
    with pytest.raises(ModelLoadError, match=r"^the LoRA folder .* holds 2 .safetensors files; give the path of one of them$"):
        load_pipeline(str(saved), lora=str(folder))
    pickled = tmp_path / "lora.bin"
    pickled.write_bytes(b"cposix\n")
    with pytest.raises(ModelLoadError, match=r"^the LoRA .* holds no .safetensors file \(found lora.bin\); pickled"):
        load_pipeline(str(saved), lora=str(pickled))
    wrong = tmp_path / "wrong.safetensors"
    save_file({"something.else": torch.ones(1)}, wrong)
    with pytest.raises(ModelLoadError, match=r"^the LoRA .* does not fit StableDiffusionImg2ImgPipeline: "):
        load_pipeline(str(saved), lora=str(wrong))


def test_options_that_cannot_work_here(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_from_pretrained", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(ModelLoadError, match=r"^cpu_offload moves modules to an accelerator and back, but device is 'cpu'"):
        load_pipeline(str(saved), cpu_offload=True)
    with pytest.raises(GenerationError, match=r"^attention 'flash' is not known; use one of 'auto', 'xformers'$"):
        load_pipeline(str(saved), attention="flash")
    with pytest.raises(GenerationError, match=r"^attention 'xformers' cannot be used: xFormers has kernels for CUDA devices"):
        load_pipeline(str(saved), attention="xformers")


def test_compile_takes_the_repeated_blocks(saved: Path) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    pipeline = load_pipeline(str(saved))
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3, 500]), torch.randn(2, 77, tiny_families.WIDTH)
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        assert compile_pipeline(pipeline, backend="eager") == "regional"
        after = pipeline.unet(*inputs).sample
    torch.testing.assert_close(before, after)
    blocks = [module for module in pipeline.unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert pipeline.unet._compiled_call_impl is None
    kandinsky = tiny_families.FAMILIES["kandinsky3"]()
    assert compile_pipeline(kandinsky, backend="eager") == "whole"
    assert kandinsky.unet._compiled_call_impl is not None


def test_batches_of_all_sizes_share_their_graphs(saved: Path) -> None:
    """Two for each width of a repeated block: for a batch of one, and for all others."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    pipeline = load_pipeline(str(saved))
    compile_pipeline(pipeline, backend="eager")
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for rows in (1, 2, 3, 5, 7, 8, 12, 16, 33):
            pipeline.unet(torch.randn(rows, 4, 16, 16), torch.arange(rows), torch.randn(rows, 77, tiny_families.WIDTH))
    widths = {
        block.norm1.normalized_shape for block in pipeline.unet.modules() if type(block).__name__ == "BasicTransformerBlock"
    }
    assert counters["stats"]["unique_graphs"] - before == 2 * len(widths)


def test_a_mode_that_does_not_exist_is_refused(saved: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^the model cannot be compiled with mode 'fast': Unrecognized mode=fast"):
        compile_pipeline(load_pipeline(str(saved)), mode="fast")


def test_padded_sizes_are_few() -> None:
    assert padded_sizes(1) == [1]
    assert padded_sizes(12) == [1, 2, 4, 8, 12]
    assert padded_sizes(16) == [1, 2, 4, 8, 16]
    for limit in range(1, 600, 7):
        sizes = padded_sizes(limit)
        assert sizes[-1] == limit
        assert len(sizes) <= 8
        assert sizes == sorted(set(sizes))


def test_denoiser_is_the_network_that_runs_at_every_step() -> None:
    flux = tiny_families.FAMILIES["flux"]()
    assert denoiser(flux) is flux.transformer
    with pytest.raises(ModelLoadError, match="object has neither a UNet nor a transformer"):
        denoiser(object())


@pytest.mark.parametrize("suffix", ["", ".fp16"])
def test_a_hub_model_in_the_local_cache_needs_no_hub(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = Path(shutil.copytree(saved, tmp_path / "models--a--b" / "snapshots" / ("0" * 40)))
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    for path in snapshot.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", f"{suffix}.safetensors")))
    assert type(load_pipeline("a/b", local_files_only=True)).__name__ == "StableDiffusionImg2ImgPipeline"
    inpainting(snapshot)
    with pytest.raises(ModelLoadError, match=r"^a/b is an inpainting checkpoint \(its UNet reads 9 channels and writes 4\);"):
        load_pipeline("a/b", local_files_only=True)


class Backend:
    """A kind of accelerator, of which this machine has several."""

    def __init__(self, count: int = 4, current: int | None = None) -> None:
        self.count, self.current = count, current

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def is_initialized(self) -> bool:
        return self.current is not None

    def current_device(self) -> int:
        assert self.current is not None, "asking would initialize it"
        return self.current


@pytest.mark.parametrize(
    ("name", "backend", "environ", "own"),
    [
        ("cuda", Backend(), {}, "cuda:0"),
        ("cuda", Backend(), {"LOCAL_RANK": "2"}, "cuda:2"),
        ("cuda", Backend(), {"SLURM_LOCALID": "3"}, "cuda:3"),
        ("cuda", Backend(), {"LOCAL_RANK": "1", "SLURM_LOCALID": "3"}, "cuda:1"),
        ("cuda", Backend(), {"LOCAL_RANK": "7"}, "cuda:0"),  # each rank sees fewer devices than there are ranks
        ("cuda", Backend(current=3), {"LOCAL_RANK": "2"}, "cuda:3"),  # torch.cuda.set_device
        ("cuda", Backend(count=1), {"LOCAL_RANK": "2"}, "cuda"),
        ("cuda", Backend(count=0), {"LOCAL_RANK": "2"}, "cuda"),
        ("cuda:1", Backend(), {"LOCAL_RANK": "2"}, "cuda:1"),
        ("xpu", Backend(), {"LOCAL_RANK": "2"}, "xpu:2"),
        ("cpu", Backend(), {"LOCAL_RANK": "2"}, "cpu"),
    ],
)
def test_a_device_without_a_number_is_that_of_this_process(
    name: str, backend: Backend, environ: dict[str, str], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    assert own_device(name) == own
    if backend.count and name != "cpu":
        assert str(check_device(name)) == own


def test_the_default_is_whatever_accelerator_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: Backend(count=1))
    for found, name in ((None, "cpu"), (torch.device("xpu"), "xpu"), (torch.device("mps"), "mps")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda found=found, **options: found)
        assert default_device() == name
