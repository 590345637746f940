"""What ``sgid doctor`` looks at: small checks, each with what to do about a problem."""

import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from sgid_transforms.cli.output import size

Status = Literal["ok", "note", "problem"]

_LEAST_FREE: Final = 2 * 10**9  # bytes; a disk with less fills up while one looks


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: what was looked at.
        status: ``"problem"``: something will not work; ``"note"``: good to know.
        detail: what was found.
        advice: what to do about it, if anything.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def versions() -> Iterator[Check]:
    """Python, this package, and everything that it requires, against the versions that it declares."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("sgid-transforms", "ok", metadata.version("sgid-transforms"))
    required, optional = _requirements()
    for name, least in required.items():
        found = _version(name)
        if found is None:
            yield Check(name, "problem", "is not installed", f"pip install '{name}>={least}'")
        elif _numbers(found) < _numbers(least):
            yield Check(name, "problem", f"{found} is older than {least}", f"pip install '{name}>={least}'")
        else:
            yield Check(name, "ok", found)
    for name, extra in optional.items():
        found = _version(name)
        yield (
            Check(name, "ok", found)
            if found
            else Check(name, "note", "is not installed (optional)", f"pip install 'sgid-transforms[{extra}]'")
        )


def devices() -> Iterator[Check]:
    """What PyTorch can compute on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads for PyTorch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _cuda_device(index)
    elif shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        yield Check(
            "cuda",
            "problem",
            f"there is an NVIDIA GPU, but PyTorch {torch.__version__} {built} and does not see it",
            "install the build of PyTorch for your driver (pytorch.org/get-started), or check CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Check("cuda", "note", "no device; the bundled model runs on the CPU, larger ones take minutes an image there")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "available")


def attention(device: str) -> Iterator[Check]:
    """Which attention kernel runs there: found by running it, not by what is installed."""
    from sgid_transforms.models.attention import probe_xformers

    kernel, others = _sdpa_kernel(device)
    yield Check(
        "attention", "ok", f"PyTorch SDPA on {device} runs its {kernel} kernel" + (f" (also works: {others})" if others else "")
    )
    obstacle = probe_xformers(device)
    if obstacle is None:
        yield Check("xformers", "ok", "its kernel runs; used where attention='xformers' is asked for")
    else:
        yield Check("xformers", "note", f"not usable: {obstacle}", "nothing: PyTorch's own attention is used")


def disk(variants: Path) -> Iterator[Check]:
    """Free space where things are written."""
    from huggingface_hub import constants

    places: dict[str, str | Path] = {
        "variants": variants,
        "temporary files": tempfile.gettempdir(),
        "models": constants.HF_HUB_CACHE,
    }
    for name, place in places.items():
        free = _free(Path(place))
        detail = f"{size(free)} free for {name} in {place}"
        if free < _LEAST_FREE:
            yield Check("disk", "problem", detail, "make room, or choose another folder (--variants, TMPDIR, HF_HOME)")
        else:
            yield Check("disk", "ok", detail)


def network(model: str) -> Iterator[Check]:
    """Whether models may be fetched. The network itself is not touched."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        yield Check("hub", "ok", "models that are not here yet are fetched from the Hugging Face hub when they are used")
    elif model == "tiny" or Path(model).is_dir():
        yield Check("hub", "note", "offline (HF_HUB_OFFLINE is set); the chosen model is here, so nothing is lacking")
    else:
        yield Check("hub", "note", "offline (HF_HUB_OFFLINE is set)", "unset it to fetch models that are not here yet")


def stores(captions: Path, variants: Path) -> Iterator[Check]:
    """Whether the stores can be read, if there are any."""
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.errors import SGIDError
    from sgid_transforms.variants.store import VariantStore

    if captions.exists():
        store = CaptionStore(captions, readonly=True)
        try:
            yield Check("captions", "ok", f"{len(store)} in {captions}")
        except SGIDError as error:
            yield Check("captions", "problem", str(error), "give another file with --captions, or restore it from a copy")
        finally:
            store.close()
    else:
        yield Check("captions", "note", f"there is no {captions} yet", "sgid generate makes it")
    if not variants.is_dir():
        yield Check("variants", "note", f"there is no folder {variants} yet", "sgid generate makes it")
        return
    try:
        stats = VariantStore(variants, readonly=True).stats()
    except SGIDError as error:
        yield Check("variants", "problem", str(error), "give another folder with --variants")
        return
    detail = f"{sum(stats.variants.values())} of {len(stats.variants)} recipes in {variants}"
    if stats.quarantined:
        yield Check("variants", "note", f"{detail}; {stats.quarantined} damaged files in quarantine", "sgid verify")
    else:
        yield Check("variants", "ok", detail)


def model(recipe: Any, device: str) -> Iterator[Check]:
    """Whether the models can be loaded; the bundled one also makes a picture. Nothing is fetched."""
    from sgid_transforms.errors import SGIDError

    try:
        generate = _load(recipe, device)
    except SGIDError as error:
        yield Check(
            "model", "problem", f"{recipe.model}: {error}", "check the name; while online, the first `sgid preview` fetches it"
        )
        return
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        yield Check("model", "problem", f"{recipe.model}: {first}", "try another --device or a smaller model")
        return
    if recipe.model != "tiny":
        yield Check("model", "ok", f"{recipe.model} loads on {device}")
        return
    yield from _try_out(generate, recipe, device)


def _try_out(generate: Any, recipe: Any, device: str) -> Iterator[Check]:
    import torch

    from sgid_transforms.generation.requests import GenerationRequest

    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    result = generate([GenerationRequest(image, "a photo of a frog", strength=1.0, guidance_scale=3.0)])[0]
    seconds = time.perf_counter() - start
    if result.image is None:
        advice = "reinstall sgid-transforms; on a GPU, try --device cpu"
        yield Check("model", "problem", f"tiny made no picture on {device}: {result.reason}", advice)
    else:
        yield Check("model", "ok", f"tiny loads and makes a picture on {device} ({1000 * seconds:.0f} ms)")


def _load(recipe: Any, device: str) -> Any:
    from sgid_transforms.building.factory import load_generator

    return load_generator(recipe, device, local_files_only=True)


def _requirements() -> tuple[dict[str, str], dict[str, str]]:
    """What this package declares: required name -> least version, optional name -> extra."""
    required: dict[str, str] = {}
    optional: dict[str, str] = {}
    for line in metadata.requires("sgid-transforms") or []:
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if found and extra and extra[1] != "dev":
            optional[found[1]] = extra[1]
        elif found and not extra:
            required[found[1]] = found[2]
    return required, optional


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _cuda_device(index: int) -> Check:
    import torch

    name = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(2, device=name).sum().item()
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["unknown error"])[0]
        advice = "the build of PyTorch may not fit the GPU or its driver; see pytorch.org/get-started"
        return Check(name, "problem", f"{properties.name} does not compute: {reason}", advice)
    detail = f"{properties.name}, {size(free)} of {size(total)} free, compute capability {properties.major}.{properties.minor}"
    return Check(name, "ok", detail)


def _sdpa_kernel(device: str) -> tuple[str, str]:
    """The kernel that PyTorch's attention chooses for a UNet's shapes, and the others that run."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from sgid_transforms.models.loading import default_dtype

    query = torch.ones(2, 8, 64, 40, device=device, dtype=default_dtype(device))
    choose = getattr(torch, "_fused_sdp_choice", None)
    chosen = SDPBackend(choose(query, query, query)).name if choose is not None else "default"
    works = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # PyTorch explains at length why a kernel does not fit
                scaled_dot_product_attention(query, query, query)
        except RuntimeError:
            continue
        if backend.name != chosen:
            works.append(_words(backend.name))
    return _words(chosen), ", ".join(works)


def _words(name: str) -> str:
    return name.removesuffix("_ATTENTION").lower()


def _free(place: Path) -> int:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
