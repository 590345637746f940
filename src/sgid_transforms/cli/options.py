"""Options that several commands share, and what they mean."""

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sgid_transforms.bulk import Models, Shard
    from sgid_transforms.recipe.recipe import Recipe

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder that holds one folder of images per class.")]
Captions = Annotated[Path, typer.Option(metavar="FILE", help="Caption store.")]
Variants = Annotated[Path, typer.Option(metavar="DIR", help="Variant store.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe (TOML): what to generate.")]
Model = Annotated[str | None, typer.Option(metavar="ID", help="Instead of a recipe: tiny, a checkpoint id, or a folder.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images per forward pass.")]
ClassNames = Annotated[
    Path | None, typer.Option(metavar="FILE", help='Words for folder names: {"n02123045": "tabby cat"} (JSON or TOML).')
]
Captioner = Annotated[str, typer.Option(metavar="ID", help="Captioning model; auto: the one that goes with the model.")]
Scorer = Annotated[str, typer.Option(metavar="ID", help="CLIP model for similarities; auto: likewise.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def recipe_from(recipe: Path | None, model: str | None) -> "Recipe":
    """The recipe of a command line.

    Raises:
        RecipeError: the file or the model's name is wrong.
    """
    from sgid_transforms.recipe.recipe import Recipe

    if recipe is not None and model is not None:
        raise typer.BadParameter("give --recipe or --model, not both: a recipe names its model")
    if recipe is not None:
        return Recipe.from_toml(recipe)
    return Recipe.for_model(model or "tiny")


def models_from(device: str, batch_size: int, captioner: str = "auto", scorer: str = "auto") -> "Models":
    """The models of a command line."""
    from sgid_transforms.bulk import Models

    return Models(resolve_device(device), captioner, scorer, batch_size=batch_size)


def shard_from(text: str) -> "Shard":
    """``2/4`` as the second of four shares."""
    from sgid_transforms.bulk import Shard

    number, slash, count = text.partition("/")
    if not slash or not number.strip().isdecimal() or not count.strip().isdecimal():
        raise typer.BadParameter(f"{text!r} is no share; give i/n, such as 2/4", param_hint="--shard")
    return Shard(int(number), int(count))


def resolve_device(device: str) -> str:
    """``auto`` as CUDA where there is a device, else the CPU; any other name only if it can be used."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise typer.BadParameter(
            f"{device!r} is no device; give auto, cpu, cuda, cuda:1 or mps", param_hint="--device"
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"PyTorch {torch.__version__} sees no CUDA device; give --device cpu, or see `sgid doctor`", param_hint="--device"
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{device!r} is not among the {torch.cuda.device_count()} devices", param_hint="--device")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise typer.BadParameter("MPS is not available here; give --device cpu", param_hint="--device")
    if found.type not in ("cpu", "cuda", "mps", "xpu"):
        raise typer.BadParameter(f"{device!r} cannot run these models; give cpu, cuda or mps", param_hint="--device")
    return device


def class_names_from(path: Path | None) -> dict[str, str] | None:
    """A mapping of folder names to words, from a JSON or TOML file."""
    if path is None:
        return None

    def refuse(why: str) -> typer.BadParameter:
        return typer.BadParameter(f'{path} {why}; write {{"folder name": "words"}}', param_hint="--class-names")

    try:
        text = path.read_text(encoding="utf-8")
        names: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # both formats' errors, and bytes that are no UTF-8
        raise refuse(f"is no {'TOML' if path.suffix == '.toml' else 'JSON'}") from None
    if not isinstance(names, dict) or not names or not all(isinstance(words, str) for words in names.values()):
        raise refuse("is no table of names")
    return names
