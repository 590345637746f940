"""The numbers of a noise schedule, laid out so that every sample of a batch can be at its own step.

Timesteps and noise levels come from diffusers' scheduler classes, created from the pipeline's scheduler config. Spacing,
offsets, Karras sigmas, trained betas and the zero-SNR rescale therefore mean the same as in diffusers. The schedulers' own
``step`` and ``add_noise`` are not used: they keep state and take one timestep for a whole batch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgid_transforms.errors import GenerationError, RecipeError
from sgid_transforms.generation.requests import check_strength, steps_to_run

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
"""Sampler -> name of the diffusers scheduler that runs the same steps."""

SAMPLERS = tuple(SCHEDULERS)

_SIGMA_DATA = 0.5  # of the consistency models' boundary condition, as LCMScheduler has it


class Step(NamedTuple):
    """What the samplers need to know about one step: ``timestep`` is ``(B,)``, all others are ``(B, 1, 1, 1)``."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor
    extrapolation: Tensor
    c_skip: Tensor
    c_out: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Step:
        """Steps of several samples, from ``(B, 8)`` with one row of each sample's `Trajectory.table`."""
        columns = rows.unbind(1)
        return cls(columns[0], *(column.view(-1, 1, 1, 1) for column in columns[1:]))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All steps that one strength runs.

    Args:
        table: a row for each step, with the columns of `Step`, in float32's precision.
        levels: each step's timestep as a share of the training timesteps, in [0, 1], falling.
    """

    table: tuple[tuple[float, ...], ...]
    levels: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.levels)


def resolve_sampler(sampler: str, scheduler: Any) -> str:
    """The sampler to use with a pipeline's scheduler: ``auto`` takes the one that matches the scheduler.

    ``auto`` maps Euler (ancestral ones too), DPM-Solver multistep and LCM schedulers to their own samplers and everything
    else to DDIM.

    Raises:
        RecipeError: the name is not known.
    """
    if sampler in SAMPLERS:
        return sampler
    if sampler != "auto":
        raise RecipeError(f"sampler {sampler!r} is not known; use 'auto' or one of {', '.join(map(repr, SAMPLERS))}")
    name = type(scheduler).__name__
    if name.startswith("Euler"):
        return "euler"
    if name.startswith("DPMSolverMultistep"):
        return "dpmsolver++"
    return "lcm" if name.startswith("LCM") else "ddim"


def check_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Refuse a number of steps that a diffusers scheduler cannot run.

    Raises:
        RecipeError: it is beyond the training timesteps, or beyond the steps that an LCM was distilled from.
    """
    trained = int(scheduler.config.get("num_train_timesteps", 1000))
    if not 1 <= num_inference_steps <= trained:
        raise RecipeError(f"num_inference_steps {num_inference_steps} does not fit the schedule; use 1 to {trained} steps")
    original = scheduler.config.get("original_inference_steps")
    if original is not None and num_inference_steps > original:
        raise RecipeError(
            f"num_inference_steps {num_inference_steps} exceeds the {original} steps that this LCM was "
            f"distilled from; use 1 to {original} steps"
        )
    # Schedulers without sigmas look up noise levels by timestep. Flow matching has neither, and its timesteps may need a size.
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        _set_timesteps(scheduler, num_inference_steps)
        last = int(scheduler.timesteps.max())
        if last >= trained:
            offset = scheduler.config.get("steps_offset", 0)
            raise RecipeError(
                f"num_inference_steps {num_inference_steps} with the checkpoint's steps_offset {offset} starts at timestep "
                f"{last}, and the schedule ends at {trained - 1}; use at most {trained - offset} steps"
            )


def _set_timesteps(scheduler: Any, num_inference_steps: int, **options: float) -> None:
    with warnings.catch_warnings():  # diffusers' way of making arrays of tensors is deprecated in NumPy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(num_inference_steps, **options)


class Schedule:
    """The steps of one sampler on one noise schedule.

    Args:
        config: config of the pipeline's scheduler (any of diffusers' discrete schedulers).
        sampler: one of `SAMPLERS`.
        num_inference_steps: steps at strength 1.
        strength_sets_range: strength shortens the range of timesteps instead of the number of steps, as in diffusers'
            ``LatentConsistencyModelImg2ImgPipeline``; for ``lcm`` only.
        exact_strength: start at exactly the noise level of the strength, with the steps spread evenly below it, instead of at
            the nearest lower level of a fixed list. With few steps the list is coarse: with 4 steps, strengths from 0.5 to 0.74
            are the same. Every strength runs at least one step. Not for ``lcm``.

    Raises:
        RecipeError: the number of steps does not fit the schedule.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        sampler: str,
        num_inference_steps: int,
        *,
        strength_sets_range: bool = False,
        exact_strength: bool = False,
    ) -> None:
        if exact_strength and sampler == "lcm":
            raise RecipeError("exact_strength has no meaning for the lcm sampler, whose steps are those of its distillation")
        self.sampler = sampler
        self.num_inference_steps = num_inference_steps
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        clips = sampler in ("ddim", "lcm") and config.get("clip_sample", False)
        self.clip: float | None = config.get("clip_sample_range", 1.0) if clips else None
        self._strength_sets_range = strength_sets_range and sampler == "lcm"
        self._exact_strength = exact_strength
        self._scheduler = _make_scheduler(config, sampler)
        self._trajectories: dict[float, Trajectory] = {}
        self._train_steps = int(self._scheduler.config.num_train_timesteps)
        check_steps(self._scheduler, num_inference_steps)
        self._timesteps, self._levels = self._numbers(1.0)

    def trajectory(self, strength: float) -> Trajectory:
        """The steps that ``strength`` runs: the last ``int(num_inference_steps * strength)`` ones.

        Raises:
            GenerationError: strength is outside (0, 1], or leaves no step.
        """
        if self._strength_sets_range or self._exact_strength:
            check_strength(strength)
            key = float(strength)
        else:
            key = float(steps_to_run(self.num_inference_steps, strength))
        if key not in self._trajectories:
            if len(self._trajectories) > 1000:  # strengths are floats: limit what a long run can pile up
                self._trajectories.clear()
            self._trajectories[key] = self._build(strength)
        return self._trajectories[key]

    def _build(self, strength: float) -> Trajectory:
        start = 0
        if self._strength_sets_range:
            timesteps, (alpha, sigma, next_alpha, next_sigma) = self._numbers(strength)
        elif self._exact_strength:
            timesteps, (alpha, sigma, next_alpha, next_sigma) = self._numbers_below(strength)
        else:
            timesteps, (alpha, sigma, next_alpha, next_sigma) = self._timesteps, self._levels
            start = self.num_inference_steps - steps_to_run(self.num_inference_steps, strength)
        extrapolation = torch.zeros_like(alpha)
        if self.sampler == "dpmsolver++":
            # The first step has no history and the last one leads to zero noise: both are of first order.
            log_snr = alpha.log() - sigma.log()
            width = log_snr.diff()
            extrapolation[1:-1] = 0.5 * width[1:] / width[:-1]
            extrapolation[start] = 0.0
            if not self._first_order_final(len(timesteps)) and len(timesteps) - 1 > start:
                final = next_alpha[-1].log() - next_sigma[-1].log() - log_snr[-1]
                extrapolation[-1] = 0.5 * final / width[-1]
        scaled = timesteps * float(self._scheduler.config.get("timestep_scaling", 10.0))
        norm = (scaled**2 + _SIGMA_DATA**2).sqrt()
        columns = (timesteps, alpha, sigma, next_alpha, next_sigma, extrapolation, (_SIGMA_DATA / norm) ** 2, scaled / norm)
        table = torch.stack(columns, 1)[start:].float().tolist()
        levels = (timesteps[start:] / max(self._train_steps - 1, 1)).tolist()
        return Trajectory(tuple(map(tuple, table)), tuple(levels))

    def _first_order_final(self, steps: int) -> bool:
        config = self._scheduler.config
        return bool(config.euler_at_final or config.final_sigmas_type == "zero" or (config.lower_order_final and steps < 15))

    def _numbers(self, strength: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Timesteps ``(S,)`` and ``alpha, sigma, next_alpha, next_sigma``, float64 ``(S,)`` each, for all steps."""
        scheduler, steps = self._scheduler, self.num_inference_steps
        options = {}
        if self._strength_sets_range:
            self._check_range(strength)
            options["strength"] = strength
        _set_timesteps(scheduler, steps, **options)
        timesteps = scheduler.timesteps.double()
        if self.sampler in ("euler", "dpmsolver++"):
            sigmas = scheduler.sigmas.double()
            alphas = 1 / (1 + sigmas**2).sqrt()
            sigmas = sigmas * alphas
            return timesteps, (alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])
        products = scheduler.alphas_cumprod.double()
        index = scheduler.timesteps.long()
        current = products[index]
        if self.sampler == "ddim":
            # As DDIMScheduler does it: one stride down, whatever timestep the list has next.
            following_index = index - self._train_steps // steps
            following = torch.where(following_index >= 0, products[following_index.clamp(min=0)], scheduler.final_alpha_cumprod)
        else:  # LCM ends on its denoised estimate, without noise
            following = torch.cat([current[1:], torch.ones(1, dtype=torch.float64)])
        return timesteps, (current.sqrt(), (1 - current).sqrt(), following.sqrt(), (1 - following).sqrt())

    def _numbers_below(self, strength: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Like `_numbers`, for steps that are spread evenly below the noise level of ``strength``, which is the first one."""
        top = max(round(strength * self._train_steps), 1)
        count = min(max(round(strength * self.num_inference_steps), 1), top)
        timesteps = torch.linspace(top, 0, count + 1, dtype=torch.float64)[:-1].round() - 1
        products = self._scheduler.alphas_cumprod.double()
        current = products[timesteps.long()]
        final = torch.ones(1, dtype=torch.float64)
        if self.sampler == "ddim":
            final = self._scheduler.final_alpha_cumprod.double().view(1)
        following = torch.cat([current[1:], final])
        return timesteps, (current.sqrt(), (1 - current).sqrt(), following.sqrt(), (1 - following).sqrt())

    def _check_range(self, strength: float) -> None:
        original = int(self._scheduler.config.original_inference_steps)
        if int(original * strength) < self.num_inference_steps:
            raise GenerationError(
                f"strength {strength:g} leaves int({original * strength:.3g}) = {int(original * strength)} of the {original} "
                f"steps that this LCM was distilled from, {self.num_inference_steps} are asked for; raise strength to at "
                f"least {self.num_inference_steps / original:g}"
            )


def _make_scheduler(config: Mapping[str, Any], sampler: str) -> Any:
    import diffusers

    cls = getattr(diffusers, SCHEDULERS[sampler])
    known = inspect.signature(cls.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and value is not None}
    if sampler == "dpmsolver++":  # other schedulers of this family share the config keys
        kept |= {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
    return cls(**kept)
