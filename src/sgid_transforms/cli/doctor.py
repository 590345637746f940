"""``sgid doctor``: small checks of what works here, with advice for each problem."""

import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from sgid_transforms.cli import options
from sgid_transforms.cli.output import ERROR, say, say_json, size
from sgid_transforms.errors import SGIDError
from sgid_transforms.files import free_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status = Literal["ok", "note", "problem"]

_LEAST_FREE: Final = 2 * 10**9  # bytes; a disk with less is soon full


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: What was checked.
        status: ``"problem"``: something will not work; ``"note"``: good to know.
        detail: What was found.
        advice: What to do about it, if anything.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""


def doctor(
    recipe: options.RecipeFile = None,
    model: options.Model = None,
    captions: options.Captions = Path("captions.sqlite"),
    variants: options.Variants = Path("variants"),
    device: options.Device = "auto",
    json: options.Json = False,
) -> int:
    """Check what works here, and what to do about the rest.

    It looks at versions, devices, attention kernels, disk space, stores, and whether the model loads. Exit code 1 if
    something will not work. It writes and fetches nothing.
    """
    wanted = options.recipe_from(recipe, model)
    where = options.resolve_device(device)
    found: list[Check] = []
    for check in chain(
        check_versions(),
        check_devices(),
        check_attention(where),
        check_disk(variants),
        check_network(wanted.model),
        check_stores(captions, variants),
        check_model(wanted, where),
    ):
        found.append(check)
        if not json:
            say(f"{check.status:<8} {check.name}: {check.detail}")
            if check.advice:
                say(f"{'':<8} -> {check.advice}")
    problems = sum(check.status == "problem" for check in found)
    if json:
        say_json({"ok": not problems, "checks": found})
    else:
        say(f"\n{problems or 'no'} problem{'s' * (problems != 1)}")
    return ERROR if problems else 0


def check_versions() -> Iterator[Check]:
    """Python, this package, and everything that it requires, against the versions that it declares."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("sgid-transforms", "ok", metadata.version("sgid-transforms"))
    for requirement, extra in _requirements():
        name, found = requirement.name, _version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            yield Check(name, "ok", found)
            continue
        detail = "is not installed" if found is None else f"{found} is installed, {requirement.specifier} is needed"
        if extra:
            yield Check(name, "note", f"{detail} (optional)", f"pip install 'sgid-transforms[{extra}]'")
        else:
            yield Check(name, "problem", detail, f"pip install '{name}{requirement.specifier}'")


def check_devices() -> Iterator[Check]:
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
        yield Check("cuda", "note", "no device; the bundled model runs on the CPU, larger ones take minutes per image there")
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "available")


def check_attention(device: str) -> Iterator[Check]:
    """Which attention kernels work on the device, found by running them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from sgid_transforms.models.attention import probe_xformers
    from sgid_transforms.models.loading import default_dtype

    query = torch.ones(2, 8, 64, 40, device=device, dtype=default_dtype(device))  # a typical shape in UNets
    kernels = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        with warnings.catch_warnings(), suppress(RuntimeError), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # PyTorch explains at length why a kernel does not fit
            scaled_dot_product_attention(query, query, query)
            kernels.append(backend.name.removesuffix("_ATTENTION").lower())
    yield Check("attention", "ok", f"PyTorch SDPA on {device} runs these kernels: {', '.join(kernels)}")
    obstacle = probe_xformers(device)
    if obstacle is None:
        yield Check("xformers", "ok", "its kernel runs; attention='xformers' uses it")
    else:
        yield Check("xformers", "note", f"not usable: {obstacle}", "nothing to do: PyTorch's own attention is used")


def check_disk(variants: Path) -> Iterator[Check]:
    """Free space where things are written."""
    from huggingface_hub import constants

    places = (("variants", variants), ("temporary files", tempfile.gettempdir()), ("models", constants.HF_HUB_CACHE))
    for name, place in places:
        free = free_bytes(place)
        detail = f"{size(free)} free for {name} in {place}"
        if free < _LEAST_FREE:
            yield Check("disk", "problem", detail, "make room, or choose another folder (--variants, TMPDIR, HF_HOME)")
        else:
            yield Check("disk", "ok", detail)


def check_network(model: str) -> Iterator[Check]:
    """Whether models may be fetched. The network itself is not touched."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        yield Check("hub", "ok", "missing models are downloaded from the Hugging Face hub on first use")
    elif model == "tiny" or Path(model).is_dir():
        yield Check("hub", "note", "offline (HF_HUB_OFFLINE is set); the chosen model is on this machine")
    else:
        yield Check("hub", "note", "offline (HF_HUB_OFFLINE is set)", "unset it to download missing models")


def check_stores(captions: Path, variants: Path) -> Iterator[Check]:
    """Whether the stores can be read, if there are any."""
    from sgid_transforms.captions.store import CaptionStore
    from sgid_transforms.variants.store import VariantStore

    if captions.exists():
        try:
            with closing(CaptionStore(captions, readonly=True)) as store:
                yield Check("captions", "ok", f"{len(store)} in {captions}")
        except SGIDError as error:
            yield Check("captions", "problem", str(error), "give another file with --captions, or restore it from a copy")
    else:
        yield Check("captions", "note", f"there is no {captions} yet", "sgid generate creates it")
    if not variants.is_dir():
        yield Check("variants", "note", f"there is no folder {variants} yet", "sgid generate creates it")
        return
    try:
        stats = VariantStore(variants, readonly=True).stats()
    except SGIDError as error:
        yield Check("variants", "problem", str(error), "give another folder with --variants")
        return
    detail = f"{sum(stats.variants.values())} from {len(stats.variants)} recipes in {variants}"
    if stats.quarantined:
        yield Check("variants", "note", f"{detail}; {stats.quarantined} damaged files in quarantine", "sgid verify")
    else:
        yield Check("variants", "ok", detail)


def check_model(recipe: Any, device: str) -> Iterator[Check]:
    """Whether the models can be loaded; the bundled one also makes a picture. Nothing is fetched."""
    try:
        import torch

        from sgid_transforms.building.builder import load_generator
        from sgid_transforms.generation.requests import GenerationRequest

        generate = load_generator(recipe, device, local_files_only=True)
    except SGIDError as error:
        yield Check("model", "problem", f"{recipe.model}: {error}", "check the name; when online, `sgid preview` downloads it")
        return
    except (RuntimeError, MemoryError, OSError, ImportError) as error:
        yield Check("model", "problem", f"{recipe.model}: {_first_line(error)}", "try another --device or a smaller model")
        return
    if recipe.model != "tiny":
        yield Check("model", "ok", f"{recipe.model} loads on {device}")
        return
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    result = generate([GenerationRequest(image, "a photo of a frog", strength=1.0, guidance_scale=3.0)])[0]
    seconds = time.perf_counter() - start
    if result.image is None:
        advice = "reinstall sgid-transforms; on a GPU, try --device cpu"
        yield Check("model", "problem", f"tiny made no picture on {device}: {result.reason}", advice)
    else:
        yield Check("model", "ok", f"tiny loads and makes a picture on {device} ({1000 * seconds:.0f} ms)")


def _requirements() -> "Iterator[tuple[Requirement, str]]":
    """The package's requirements on this system, each with its extra, if any; without those of its developers."""
    from packaging.requirements import Requirement

    extras = metadata.metadata("sgid-transforms").get_all("Provides-Extra") or []
    for requirement in map(Requirement, metadata.requires("sgid-transforms") or []):
        for extra in ("", *(extra for extra in extras if extra != "dev")):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield requirement, extra
                break


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda_device(index: int) -> Check:
    import torch

    name = f"cuda:{index}"
    properties = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(2, device=name).sum().item()
    except RuntimeError as error:
        advice = "the build of PyTorch may not fit the GPU or its driver; see pytorch.org/get-started"
        return Check(name, "problem", f"{properties.name} cannot compute: {_first_line(error)}", advice)
    detail = f"{properties.name}, {size(free)} of {size(total)} free, compute capability {properties.major}.{properties.minor}"
    return Check(name, "ok", detail)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
