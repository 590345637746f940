"""What to generate: every setting that decides a variant's pixels, in one immutable object with a fingerprint."""

import dataclasses
import hashlib
import json
import math
import os
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, Self

from sgid_transforms.errors import RecipeError
from sgid_transforms.files import atomic_write
from sgid_transforms.recipe import checks as _checks
from sgid_transforms.recipe.guidance import SimilarityGuidance
from sgid_transforms.recipe.presets import PRESETS, STRENGTH_RANGES, TINY, TINY_EDITION, preset_for_model
from sgid_transforms.recipe.prompts import CAPTION_MODES, parse_template

LabelCheck = Literal["none", "argmax", "threshold"]

LABEL_CHECKS: Final = ("none", "argmax", "threshold")
SAMPLERS: Final = ("auto", "ddim", "euler", "dpmsolver++", "lcm")
CAPTION_SOURCES: Final = ("own", "class", "dataset")
CONTRADICTION_POLICIES: Final = ("context", "drop", "keep")
IMAGE_FORMATS: Final = (
    "auto",
    "png",
    "webp-lossless",
    "webp",
    "jpeg",
)  # "auto": png up to 256 x 256 pixels, jpeg above (docs/stores.md)

MIN_STRENGTH: Final = 0.001  # 1000 steps, the maximum, run one step at this strength; 0 would be the original itself

# Raise it when new code makes other pixels from the same recipe. It is hashed, and it is the fingerprint's first byte.
FINGERPRINT_VERSION: Final = 1


@dataclass(frozen=True)
class Filters:
    """What a generated image must pass before it counts as a variant. NaN, constant and black images never pass.

    Args:
        label_check: ``"none"``; ``"argmax"``: of all class names, CLIP must find the label most probable (as in DISEF);
            ``"threshold"``: CLIP's softmax probability of the label must reach ``label_threshold``.
        label_threshold: probability in [0, 1], over the class names of the data set.
        min_image_similarity: lowest CLIP cosine of (variant, original), in [-1, 1]; below it the variant has drifted too far
            from its original. ``None``: no limit.
        max_image_similarity: highest such cosine; above it the variant is too close to its original. ``None``: no limit.
        reject_nsfw: reject what the pipeline's safety checker flags (a pipeline without one flags nothing).
        max_retries: further attempts after a rejection, each with another seed, 0 to 100.

    Raises:
        RecipeError: for a value of the wrong type or outside its range, in one sentence.

    Examples:
        >>> Recipe(filters=Filters("argmax", max_retries=1)).filters.label_check
        'argmax'
    """

    label_check: LabelCheck = "none"
    label_threshold: float = 0.5
    min_image_similarity: float | None = None
    max_image_similarity: float | None = None
    reject_nsfw: bool = True
    max_retries: int = 2

    def __post_init__(self) -> None:
        put = object.__setattr__  # the way to normalise the fields of a frozen dataclass
        _checks.choice("filters.label_check", self.label_check, LABEL_CHECKS)
        put(self, "label_threshold", _checks.number("filters.label_threshold", self.label_threshold, minimum=0.0, maximum=1.0))
        for name in ("min_image_similarity", "max_image_similarity"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, _checks.number(f"filters.{name}", value, minimum=-1.0, maximum=1.0))
        if not isinstance(self.reject_nsfw, bool):
            raise RecipeError(f"filters.reject_nsfw is {self.reject_nsfw!r}; it must be true or false")
        put(self, "max_retries", _checks.integer("filters.max_retries", self.max_retries, minimum=0, maximum=100))
        low, high = self.min_image_similarity, self.max_image_similarity
        if low is not None and high is not None and low >= high:
            raise RecipeError(
                f"filters.min_image_similarity {low} is not below max_image_similarity {high}: nothing could pass; swap them"
            )


_BY_MODEL: Any = None  # __post_init__ replaces it with the value of the model's preset
_BY_MODEL_FIELDS: Final = (
    "strength", "guidance", "num_inference_steps", "sampler", "guidance_interval", "resolution", "exact_strength",
    "caption_mode", "caption_from",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What to generate. Two recipes with the same `fingerprint` make the same variants.

    Strength, guidance, its interval, steps, sampler, resolution, exact strength, caption mode and caption source default to
    what suits the model. This holds here, for `for_model`, in a TOML file, and for `replace` with another model.

    Args:
        model: ``"tiny"`` (bundled), another preset's name (``"sd-turbo"`` stands for its checkpoint), a diffusers checkpoint
            id, or a local folder.
        revision: branch, tag or commit of the checkpoint; ``None``: its default branch. The content of a local folder is not
            checked: give any text here, and change it when the folder changes. For a pipeline that you load yourself
            (``Generator.from_recipe(recipe, pipeline=...)``), give a name here.
        lora: LoRA weights that are fused into the model: a ``.safetensors`` file, a folder with one, or a hub id; ``None``:
            none. The fingerprint covers a local file's content, but only the name of a hub id.
        lora_scale: weight of the LoRA.
        prompt: template in which ``{label}`` and ``{caption}`` are replaced; ``{{`` and ``}}`` stand for braces.
        negative_prompt: text that guidance steers away from; has no effect if the guidance scale is at most 1.
        strength: share of the noise schedule that is redone, in [0.001, 1]: near 0 returns the original, 1 ignores it. From a
            range ``(low, high)``, each variant draws its strength uniformly.
        guidance: classifier-free guidance scale, at least 0, or a `SimilarityGuidance`. Values up to 1 mean no guidance.
        num_inference_steps: steps of the whole schedule, 1 to 1000; ``int(num_inference_steps * strength)`` of them are run,
            at least one (a latent consistency model runs them all, over a shorter range of noise; see also
            ``exact_strength``).
        resolution: the model's working size in pixels: the side of a square whose area is kept for other aspect ratios, or
            ``(height, width)``; ``None``: what the model's card names, else the model's own. Variants come back in the size of
            their original.
        sampler: ``"ddim"``, ``"euler"``, ``"dpmsolver++"`` (2M), ``"lcm"``, or ``"auto"``: the checkpoint's own.
        guidance_interval: ``(low, high)`` shares of the noise schedule, 0 clean to 1 pure noise, between which guidance acts;
            outside it the prompt is followed without guidance (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        exact_strength: start at exactly the noise level of the strength, with ``round(num_inference_steps * strength)`` steps
            (at least one) spread evenly below it. Otherwise it starts at the nearest lower level of a fixed list: with 4
            steps, all strengths from 0.5 to 0.74 are the same. Native path only, and not for ``"lcm"``. ``None``: the value
            of the model's preset, where the sampler allows it.
        seed: the user's seed, in [0, 2**63).
        filters: see `Filters`.
        image_format: how variants are stored: ``"png"``, ``"webp-lossless"``, ``"webp"``, ``"jpeg"``, or ``"auto"``: by size.
        caption_mode: what the captioner writes. ``"free"``: captions from the pixels alone. ``"label"``: captions that
            describe the image and name its label. ``"context"``: captions of everything but the object, which they never name.
        caption_from: whose caption a variant gets. ``"own"``: that of its image. ``"dataset"``: the context (all but the
            subject) of an image drawn from the whole data set, a new one for each variant. ``"class"``: the same, but from its
            class.
        on_contradiction: which part of a caption is used if it contradicts its label: its ``"context"``, none (``"drop"``), or
            all of it (``"keep"``).

    Raises:
        RecipeError: for a value of the wrong type or outside its range, in one sentence.

    Examples:
        >>> recipe = Recipe(model="tiny", strength=(0.3, 0.9), guidance=5.0)
        >>> recipe.replace(seed=1).fingerprint == recipe.fingerprint
        False
        >>> recipe.to_toml("recipe.toml")
        >>> Recipe.from_toml("recipe.toml") == recipe
        True
    """

    model: str = TINY["model"]
    revision: str | None = None
    prompt: str = "a photo of a {label}, {caption}"
    negative_prompt: str = ""
    strength: float | tuple[float, float] = _BY_MODEL
    guidance: float | SimilarityGuidance = _BY_MODEL
    num_inference_steps: int = _BY_MODEL
    resolution: int | tuple[int, int] | None = None
    sampler: str = _BY_MODEL
    guidance_interval: tuple[float, float] = _BY_MODEL
    exact_strength: bool | None = None
    seed: int = 0
    filters: Filters = field(default_factory=Filters)
    image_format: str = "auto"
    lora: str | None = None
    lora_scale: float = 1.0
    caption_mode: str = _BY_MODEL
    caption_from: str = _BY_MODEL
    on_contradiction: str = "context"

    def __post_init__(self) -> None:
        put = object.__setattr__  # normalised here, so that equal settings are equal recipes: 5 and 5.0, a list and a tuple
        suitable: dict[str, Any] = dict(preset_for_model(_model(self.model)))
        put(self, "model", suitable["model"])
        for name in _BY_MODEL_FIELDS:
            if getattr(self, name) is None and name != "exact_strength":  # which depends on the sampler as well
                put(self, name, suitable[name])
        if self.revision is not None:
            _non_empty("revision", self.revision)
        parse_template(self.prompt)
        _checks.text("negative_prompt", self.negative_prompt)
        put(self, "strength", _strength(self.strength))
        if not isinstance(self.guidance, SimilarityGuidance):
            put(self, "guidance", _checks.number("guidance", self.guidance, minimum=0.0))
        steps = _checks.integer("num_inference_steps", self.num_inference_steps, minimum=1, maximum=1000)
        put(self, "num_inference_steps", steps)
        put(self, "exact_strength", _exact_strength(self.exact_strength, suitable["exact_strength"], self.sampler))
        # A latent consistency model runs all steps at any strength (the engine checks it); exact strength runs at least one.
        if self.sampler != "lcm" and not self.exact_strength:
            _check_steps(self.strength[0] if isinstance(self.strength, tuple) else self.strength, steps)
        put(self, "resolution", _resolution(self.resolution))
        _checks.choice("sampler", self.sampler, SAMPLERS)
        put(self, "guidance_interval", _interval("guidance_interval", self.guidance_interval))
        put(self, "seed", _checks.integer("seed", self.seed, minimum=0, maximum=2**63 - 1))
        if not isinstance(self.filters, Filters):
            raise RecipeError(f"filters is {self.filters!r}; it must be a Filters object")
        _checks.choice("image_format", self.image_format, IMAGE_FORMATS)
        if self.lora is not None:
            put(self, "lora", _non_empty("lora", os.fspath(self.lora) if isinstance(self.lora, os.PathLike) else self.lora))
        put(self, "lora_scale", _checks.number("lora_scale", self.lora_scale))
        _checks.choice("caption_mode", self.caption_mode, CAPTION_MODES)
        _checks.choice("caption_from", self.caption_from, CAPTION_SOURCES)
        _checks.choice("on_contradiction", self.on_contradiction, CONTRADICTION_POLICIES)

    @cached_property
    def fingerprint(self) -> str:
        """24 lowercase hex digits that change with every setting that can change a stored pixel, and with nothing else.

        The first two are the version of the scheme. The others are the start of a SHA-256 over the fields as canonical JSON
        (sorted keys, floats in their shortest decimal form). They are the same on every platform and Python version.

        Raises:
            RecipeError: The LoRA's file cannot be read.
        """
        fields = dataclasses.asdict(self)
        if not self.exact_strength:
            del fields["exact_strength"]  # added later; left out when off, so that older fingerprints stay the same
        del fields["lora"], fields["lora_scale"]  # also added later
        # These decide which caption is used, and a variant's address already covers that text.
        del fields["caption_mode"], fields["on_contradiction"]
        if self.caption_from == "own":
            del fields["caption_from"]
        if self.lora is not None:
            fields |= {"lora": _content(self.lora), "lora_scale": self.lora_scale}
        content: dict[str, Any] = {"version": FINGERPRINT_VERSION, "recipe": fields}
        if self.model == TINY["model"]:
            content["edition"] = TINY_EDITION
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{FINGERPRINT_VERSION:02x}{hashlib.sha256(canonical.encode('ascii')).hexdigest()[:22]}"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """A recipe by name, with some fields overridden.

        ``"tiny"``, ``"sd15"``, ``"lcm"``, ``"sd-turbo"`` and ``"sdxl-turbo"`` are models with the settings that suit them.
        ``"fine_grained"`` and ``"coarse"`` are strength ranges for a kind of images. They apply to ``model=`` (a preset's
        name, a checkpoint id or a folder; by default ``tiny``), and raise its number of steps if the lowest strength would
        run none.

        Raises:
            RecipeError: for an unknown name or field, with the nearest valid spelling, or an invalid value.
        """
        _checks.choice("preset", name, (*PRESETS, *STRENGTH_RANGES))
        if name in PRESETS:
            return cls._from_settings({"model": PRESETS[name]["model"]} | overrides)
        base = preset_for_model(_model(overrides.get("model", TINY["model"])))
        settings: dict[str, Any] = {"strength": STRENGTH_RANGES[name]}
        if base["sampler"] != "lcm" and not base["exact_strength"]:
            settings["num_inference_steps"] = max(base["num_inference_steps"], _minimum_steps(STRENGTH_RANGES[name][0]))
        return cls._from_settings(settings | overrides)

    @classmethod
    def for_model(cls, model: str, **overrides: Any) -> Self:
        """The same as ``Recipe(model=model, **overrides)``.

        A distilled model is recognised by its name (``sd-turbo``, ``sdxl-turbo``, ``lcm``); any other one gets the steps and
        guidance of ``sd15``.
        """
        return cls._from_settings({"model": model} | overrides)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a recipe from a TOML file, as `to_toml` writes it; fields that are left out keep their defaults.

        A line ``preset = "sd-turbo"`` takes that preset's settings instead of the defaults.

        Raises:
            RecipeError: if the file cannot be read, is not TOML, or has an unknown field or an invalid value.
        """
        settings = _read_toml(path)
        try:
            if isinstance(settings.get("guidance"), dict):
                table = settings["guidance"]
                _checks.known_names("[guidance]", table, _names(SimilarityGuidance))
                for bound in ("low", "high"):
                    if bound not in table:
                        raise RecipeError(f"[guidance] has no {bound}; give both low and high, or one number: guidance = 4.0")
                settings["guidance"] = SimilarityGuidance(**table)
            if isinstance(settings.get("filters"), dict):
                _checks.known_names("[filters]", settings["filters"], _names(Filters))
                settings["filters"] = Filters(**settings["filters"])
            preset = settings.pop("preset", None)
            return cls._from_settings(settings) if preset is None else cls.preset(preset, **settings)
        except RecipeError as error:
            raise RecipeError(f"{os.fspath(path)}: {error}") from None

    def to_toml(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to a TOML file atomically; `from_toml` reads an equal recipe from it.

        Raises:
            RecipeError: if the file cannot be written; an existing file is left unchanged.
        """
        import tomli_w

        settings = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        settings["filters"] = {name: value for name, value in settings["filters"].items() if value is not None}
        try:
            atomic_write(path, tomli_w.dumps(settings), fsync=True)
        except OSError as error:
            raise RecipeError(f"cannot write the recipe {os.fspath(path)}: {error.strerror}") from error

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed; it is checked like a new recipe.

        If the model changes, every setting that still has the old model's default gets the new model's default, unless it is
        among ``changes``.
        """
        _checks.known_names("a recipe", changes, _names(type(self)))
        if "model" in changes:
            usual = type(self)(model=self.model)
            for name in _BY_MODEL_FIELDS:
                if name not in changes and getattr(self, name) == getattr(usual, name):
                    changes[name] = None
        return dataclasses.replace(self, **changes)

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Self:
        _checks.known_names("a recipe", settings, _names(cls))
        return cls(**settings)


def _minimum_steps(strength: float) -> int:
    """The smallest ``num_inference_steps`` with which ``strength`` runs a step: ``ceil(1 / strength)`` up to rounding."""
    steps = max(1, math.floor(1 / strength))
    while int(steps * strength) < 1:
        steps += 1
    return steps


def _check_steps(strength: float, num_inference_steps: int) -> None:
    """Refuse a strength that would run no step and so return the original; diffusers counts in the same way."""
    if int(num_inference_steps * strength) < 1:
        raise RecipeError(
            f"strength {strength:g} with {num_inference_steps} steps runs int({num_inference_steps * strength:g}) = 0 steps; "
            f"raise num_inference_steps to at least {_minimum_steps(strength)}"
        )


def _names(cls: type) -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(cls))


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(path)
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, thousands of digits, or nested too deeply
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RecipeError(f"{name} is not valid TOML: {reason}") from error


def _content(lora: str) -> str:
    """What identifies a LoRA in the fingerprint: the digest of a local file's content, else the hub id itself."""
    path = Path(lora).expanduser()
    if path.is_dir():
        weights = sorted(path.glob("*.safetensors"))
        if len(weights) != 1:
            raise RecipeError(f"the LoRA folder {lora!r} holds {len(weights)} .safetensors files; give the path of one file")
        path = weights[0]
    elif not path.is_file():
        if lora.count("/") != 1 or lora.startswith((".", "~", "/")) or lora.endswith(".safetensors"):
            raise RecipeError(f"the LoRA {lora!r} does not exist; give a .safetensors file, a folder with one, or a hub id")
        return lora
    try:
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise RecipeError(f"the LoRA {lora!r} cannot be read ({error.strerror}); check the file") from error


def _non_empty(name: str, value: object) -> str:
    if not _checks.text(name, value).strip():
        raise RecipeError(f"{name} is empty; leave it out, or give a value")
    return str(value)


def _model(value: object) -> str:
    """The model's name. A folder named like a preset must be written as a path: ``./sd-turbo`` or ``sd-turbo/``."""
    is_path = isinstance(value, os.PathLike)
    name = _non_empty("model", os.fspath(value) if isinstance(value, os.PathLike) else value)
    if name.endswith("/") and name.strip("/"):
        is_path, name = True, name.rstrip("/")
    return f"./{name}" if is_path and name in PRESETS else name


def _strength(value: object) -> float | tuple[float, float]:
    if not isinstance(value, (tuple, list)):
        return _checks.number("strength", value, minimum=MIN_STRENGTH, maximum=1.0)
    low, high = (_checks.number("strength", end, minimum=MIN_STRENGTH, maximum=1.0) for end in _checks.pair("strength", value))
    if low > high:
        raise RecipeError(f"strength ({low}, {high}) has its ends swapped; write ({high}, {low})")
    return low, high


def _interval(name: str, value: object) -> tuple[float, float]:
    low, high = (_checks.number(name, end, minimum=0.0, maximum=1.0) for end in _checks.pair(name, value))
    if low >= high:
        raise RecipeError(f"{name} ({low}, {high}) is empty; its low end must be below its high end")
    return low, high


def _exact_strength(value: object, suitable: bool, sampler: object) -> bool:
    if value is None:
        return suitable and sampler != "lcm"
    if not isinstance(value, bool):
        raise RecipeError(f"exact_strength is {value!r}; it must be true or false")
    if value and sampler == "lcm":
        raise RecipeError(
            "exact_strength has no meaning for sampler 'lcm', which runs all its steps at any strength; set it to false"
        )
    return value


def _resolution(value: object) -> int | tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list)):
        height, width = (
            _checks.integer("resolution", side, minimum=8, maximum=8192) for side in _checks.pair("resolution", value)
        )
        return height, width
    return _checks.integer("resolution", value, minimum=8, maximum=8192)
