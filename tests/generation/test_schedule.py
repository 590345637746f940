from typing import Any

import diffusers
import pytest
import torch

from sgid_transforms.errors import GenerationError, RecipeError
from sgid_transforms.generation.schedule import SAMPLERS, Schedule, Step, resolve_sampler
from tiny_models import SD_BETAS


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_strength_runs_the_last_steps(sampler: str, spacing: str) -> None:
    schedule = Schedule(SD_BETAS | {"timestep_spacing": spacing, "steps_offset": 1}, sampler, 10)
    full, half = schedule.trajectory(1.0), schedule.trajectory(0.5)
    assert (len(full), len(half)) == (10, 5)
    assert full.levels[5:] == half.levels
    assert sorted(full.levels, reverse=True) == list(full.levels)
    assert 0 <= full.levels[-1] < full.levels[0] <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_are_variance_preserving_and_chain(sampler: str) -> None:
    table = Schedule(SD_BETAS, sampler, 12).trajectory(0.8).table
    step = Step.of(torch.tensor(table))
    torch.testing.assert_close(step.alpha**2 + step.sigma**2, torch.ones(9, 1, 1, 1))
    torch.testing.assert_close(step.next_alpha**2 + step.next_sigma**2, torch.ones(9, 1, 1, 1))
    if sampler in ("euler", "dpmsolver++"):
        torch.testing.assert_close(step.next_alpha[:-1], step.alpha[1:])
        assert step.next_sigma[-1] == 0
    assert torch.tensor(table).isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": torch.linspace(0.001, 0.01, 1000).tolist()},
        SD_BETAS | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
    ids=["linear", "cosine", "trained", "zero_snr"],
)
def test_levels_come_from_the_schedulers_betas(config: dict[str, Any]) -> None:
    scheduler = diffusers.DDIMScheduler(**config)
    step = Step.of(torch.tensor(Schedule(config, "ddim", 5).trajectory(1.0).table))
    expected = scheduler.alphas_cumprod[step.timestep.long()]
    torch.testing.assert_close(step.alpha.flatten() ** 2, expected, atol=1e-6, rtol=1e-6)


def test_ddim_ends_on_the_first_alpha_or_on_one() -> None:
    last = {one: Schedule(SD_BETAS | {"set_alpha_to_one": one}, "ddim", 5).trajectory(1.0).table[-1] for one in (True, False)}
    assert last[True][3] == 1
    assert last[False][3] == pytest.approx((1 - 0.00085) ** 0.5)


@pytest.mark.parametrize(("sampler", "clip"), [("ddim", 2.0), ("lcm", 2.0), ("euler", None), ("dpmsolver++", None)])
def test_clipping_where_diffusers_clips(sampler: str, clip: float | None) -> None:
    assert Schedule(SD_BETAS | {"clip_sample": True, "clip_sample_range": 2.0}, sampler, 5).clip == clip


def test_a_config_that_does_not_speak_of_clipping_does_not_clip() -> None:
    """Euler's config has no clip_sample, and DDIM's own default would clip latents, whose range is no image's."""
    assert Schedule(dict(diffusers.EulerDiscreteScheduler(**SD_BETAS).config), "ddim", 5).clip is None


def test_dpmpp_starts_each_trajectory_at_first_order() -> None:
    schedule = Schedule(SD_BETAS, "dpmsolver++", 20)
    extrapolation = torch.tensor(schedule.trajectory(0.5).table)[:, 5]
    assert extrapolation[0] == 0
    assert extrapolation[-1] == 0
    assert (extrapolation[1:-1] > 0).all()
    assert schedule.trajectory(1.0).table[10][5] > 0  # the same timestep, further on in a longer run


def test_lcm_range_follows_strength() -> None:
    schedule = Schedule(SD_BETAS, "lcm", 4, strength_sets_range=True)
    short, full = schedule.trajectory(0.4), schedule.trajectory(1.0)
    assert len(short) == len(full) == 4
    assert short.levels[0] == pytest.approx(399 / 999)
    assert full.levels[0] == 1
    with pytest.raises(GenerationError, match=r"strength 0.05 leaves int\(2.5\) = 2 of the 50 steps .* at least 0.08"):
        schedule.trajectory(0.05)
    with pytest.raises(GenerationError, match="outside"):
        schedule.trajectory(1.5)


def test_trajectories_are_made_once() -> None:
    schedule = Schedule(SD_BETAS, "ddim", 10)
    assert schedule.trajectory(0.51) is schedule.trajectory(0.55)


def test_many_strengths_do_not_pile_up() -> None:
    schedule = Schedule(SD_BETAS, "lcm", 2, strength_sets_range=True)
    first = schedule.trajectory(0.5)
    for i in range(1001):
        schedule.trajectory(0.6 + i / 5000)
    again = schedule.trajectory(0.5)
    assert again is not first
    torch.testing.assert_close(again.table, first.table)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_that_do_not_fit_the_schedule(steps: int) -> None:
    with pytest.raises(RecipeError, match=f"num_inference_steps {steps} does not fit the schedule; use 1 to 1000 steps"):
        Schedule(SD_BETAS, "ddim", steps)


def test_more_steps_than_an_lcm_was_distilled_from() -> None:
    with pytest.raises(RecipeError, match="num_inference_steps 51 exceeds the 50 steps"):
        Schedule(SD_BETAS, "lcm", 51)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, under NumPy 2
@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmsolver++"),
        ("LCMScheduler", "lcm"),
    ],
)
def test_auto_follows_the_scheduler(scheduler: str, sampler: str) -> None:
    made = getattr(diffusers, scheduler)()
    assert resolve_sampler("auto", made) == sampler
    assert resolve_sampler("euler", made) == "euler"


def test_unknown_sampler() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_sampler("heun", diffusers.DDIMScheduler())
    message = "sampler 'heun' is not known; use 'auto' or one of 'ddim', 'euler', 'dpmsolver++', 'lcm'"
    assert str(caught.value) == message


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
@pytest.mark.parametrize(
    ("strength", "steps", "top"), [(0.5, 2, 500), (0.7, 3, 700), (0.13, 1, 130), (0.0001, 1, 1), (1.0, 4, 1000)]
)
def test_exact_strength_starts_at_its_own_level(sampler: str, strength: float, steps: int, top: int) -> None:
    trajectory = Schedule(SD_BETAS, sampler, 4, exact_strength=True).trajectory(strength)
    step = Step.of(torch.tensor(trajectory.table))
    assert len(trajectory) == steps
    assert step.timestep[0] == top - 1
    torch.testing.assert_close(step.timestep, torch.linspace(top, 0, steps + 1)[:-1].round() - 1)
    products = diffusers.DDIMScheduler(**SD_BETAS).alphas_cumprod
    torch.testing.assert_close(step.alpha.flatten() ** 2, products[step.timestep.long()])
    torch.testing.assert_close(step.next_alpha[:-1], step.alpha[1:])
    assert step.next_sigma[-1] == 0
    assert step.extrapolation[0] == step.extrapolation[-1] == 0


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_exact_strength_equals_trailing_steps_where_these_start_there_too(sampler: str) -> None:
    config = SD_BETAS | {"timestep_spacing": "trailing"}
    exact = Schedule(config, sampler, 10, exact_strength=True).trajectory(0.5).table
    listed = Schedule(config, sampler, 10).trajectory(0.5).table
    torch.testing.assert_close(torch.tensor(exact)[:, :6], torch.tensor(listed)[:, :6])


def test_exact_strength_has_limits() -> None:
    with pytest.raises(GenerationError, match="outside"):
        Schedule(SD_BETAS, "ddim", 4, exact_strength=True).trajectory(0.0)
    with pytest.raises(RecipeError, match="exact_strength has no meaning for the lcm sampler"):
        Schedule(SD_BETAS, "lcm", 4, exact_strength=True)
