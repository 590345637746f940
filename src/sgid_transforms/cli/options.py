"""Options that several commands share, and the objects that they stand for."""

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sgid_transforms.cli.output import fail
from sgid_transforms.errors import ModelLoadError

if TYPE_CHECKING:
    from sgid_transforms.bulk import Models, Shard
    from sgid_transforms.recipe.recipe import Recipe
    from sgid_transforms.variants.store import VariantStore

Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder that holds one folder of images per class.")]
Captions = Annotated[Path, typer.Option(metavar="FILE", help="Caption store.")]
Variants = Annotated[Path, typer.Option(metavar="DIR", help="Variant store.")]
Store = Annotated[Path, typer.Argument(metavar="DIR", help="Variant store.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe (TOML): what to generate.")]
Model = Annotated[str | None, typer.Option(metavar="ID", help="Instead of a recipe: tiny, a checkpoint id, or a folder.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.")]
Devices = Annotated[
    str, typer.Option("--device", metavar="NAMES", help="As auto, cuda:1, mps; several, as cuda:0,cuda:1, or all of them.")
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Images per forward pass.")]
ClassNames = Annotated[
    Path | None, typer.Option(metavar="FILE", help='Words for folder names: {"n02123045": "tabby cat"} (JSON or TOML).')
]
Captioner = Annotated[str, typer.Option(metavar="ID", help="Captioning model; auto: the one that suits the model.")]
Scorer = Annotated[str, typer.Option(metavar="ID", help="CLIP model for similarities; auto: as for captions.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def recipe_from(recipe: Path | None, model: str | None) -> "Recipe":
    """Make the recipe of a command line.

    Raises:
        RecipeError: The file or the model's name is wrong.
    """
    from sgid_transforms.recipe.recipe import Recipe

    if recipe is not None and model is not None:
        raise typer.BadParameter("give --recipe or --model, not both: a recipe names its model")
    return Recipe.from_toml(recipe) if recipe is not None else Recipe.for_model("tiny" if model is None else model)


def models_from(device: str, batch_size: int, captioner: str = "auto", scorer: str = "auto") -> "Models":
    """Choose the models of a command line."""
    from sgid_transforms.bulk import Models

    return Models(resolve_device(device), captioner, scorer, batch_size=batch_size)


def shard_from(text: str) -> "Shard":
    """Read ``2/4`` as the second of four shares, and ``auto`` as what the environment says."""
    from sgid_transforms.bulk import Shard
    from sgid_transforms.errors import RecipeError

    if text.strip() == "auto":
        try:
            return Shard.from_environment()
        except RecipeError as error:
            raise typer.BadParameter(str(error), param_hint="--shard") from None
    number, slash, count = text.partition("/")
    if not slash or not number.strip().isdecimal() or not count.strip().isdecimal():
        raise typer.BadParameter(f"{text!r} is not a share; give i/n, such as 2/4, or auto", param_hint="--shard")
    return Shard(int(number), int(count))


def variant_store(path: Path, readonly: bool = True) -> "VariantStore":
    """Open an existing variant store."""
    from sgid_transforms.variants.store import VariantStore

    if not path.is_dir():
        fail(f"there is no variant store at {path}; give its folder, or run sgid generate first")
    return VariantStore(path, readonly=readonly)


def resolve_device(device: str) -> str:
    """Choose the accelerator for ``auto`` where there is one, else the CPU; refuse any other name that cannot be used."""
    from sgid_transforms.models.loading import check_device, default_device

    if device == "auto":
        return default_device()
    try:
        return str(check_device(device))
    except ModelLoadError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def resolve_devices(devices: str) -> list[str]:
    """The devices of a list such as ``cuda:0,cuda:1``, or of ``all``."""
    from sgid_transforms.models.loading import all_devices

    names = [name.strip() for name in devices.split(",")]
    if names == ["auto"]:
        return [resolve_device("auto")]
    try:
        return all_devices(names)
    except ModelLoadError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def class_names_from(path: Path | None) -> dict[str, str] | None:
    """Read a mapping of folder names to words from a JSON or TOML file."""
    if path is None:
        return None
    names: Any = None
    is_toml = path.suffix.lower() == ".toml"
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = tomllib.loads(text) if is_toml else json.loads(text, object_pairs_hook=_each_once)
        problem = "is not a table of names"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        problem = "is not UTF-8"
    except _TwiceError as error:
        problem = f"names the class {str(error)!r} twice"
    except (ValueError, RecursionError):  # both formats' errors
        problem = f"is not {'TOML' if is_toml else 'JSON'}"
    if not isinstance(names, dict) or not names or not all(isinstance(words, str) for words in names.values()):
        raise typer.BadParameter(f'{path} {problem}; write {{"folder name": "words"}}', param_hint="--class-names")
    return names


class _TwiceError(ValueError):
    """A name that occurs twice; JSON would silently take the last one."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(name)
        found[name] = value
    return found
