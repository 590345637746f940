"""The samplers against what is known in closed form: a data set of one point, whose ideal model output is exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sgid_transforms.generation import samplers


def levels(*sigmas: float) -> tuple[Tensor, Tensor]:
    sigma = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1)
    return (1 - sigma**2).sqrt(), sigma


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


OUTPUTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, alpha, sigma: noise,
    "v_prediction": lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0,
    "sample": lambda x0, noise, alpha, sigma: x0,
}


@pytest.mark.parametrize("kind", samplers.PREDICTION_TYPES)
def test_predictions_recover_both_parts(kind: str) -> None:
    x0, noise = draw(3, 2, 4, 4), draw(6, 2, 4, 4)[3:]
    alpha, sigma = levels(0.1, 0.5, 0.99)
    x = samplers.add_noise(x0, noise, alpha, sigma)
    output = OUTPUTS[kind](x0, noise, alpha, sigma)
    torch.testing.assert_close(samplers.predict_x0(kind, output, x, alpha, sigma), x0)
    torch.testing.assert_close(samplers.predict_noise(kind, output, x, alpha, sigma), noise)


def test_steps_land_on_the_next_level_when_the_model_is_right() -> None:
    x0, noise = draw(3, 2, 4, 4), draw(6, 2, 4, 4)[3:]
    alpha, sigma = levels(0.3, 0.6, 0.9)
    next_alpha, next_sigma = levels(0.1, 0.0, 0.5)
    x = samplers.add_noise(x0, noise, alpha, sigma)
    expected = samplers.add_noise(x0, noise, next_alpha, next_sigma)
    torch.testing.assert_close(samplers.ddim_step(x0, noise, next_alpha, next_sigma), expected)
    torch.testing.assert_close(samplers.euler_step(x, x0, alpha, sigma, next_alpha, next_sigma), expected)
    zero = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    first_order = samplers.dpmpp_2m_step(x, x0, draw(3, 2, 4, 4), alpha, sigma, next_alpha, next_sigma, zero)
    torch.testing.assert_close(first_order, expected)


def test_dpmpp_extrapolates_the_clean_estimate() -> None:
    """An estimate that moves at a constant rate in log-SNR is followed better with the step before than without."""
    log_snr = torch.tensor([-1.0, -0.6, -0.2], dtype=torch.float64)

    def at(index: int) -> tuple[Tensor, Tensor]:
        alpha = torch.sigmoid(2 * log_snr[index]).sqrt()
        return alpha.view(1, 1, 1, 1), (1 - alpha**2).sqrt().view(1, 1, 1, 1)

    def estimate(index: int) -> Tensor:
        return (1.0 + log_snr[index]).view(1, 1, 1, 1)

    # the exact solution: x / sigma grows by the integral of exp(l) * x0(l), with x0(l) = 1 + l: exp(l) * l
    def primitive(index: int) -> Tensor:
        return (log_snr[index].exp() * log_snr[index]).view(1, 1, 1, 1)

    (alpha, sigma), (next_alpha, next_sigma) = at(1), at(2)
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    exact = next_sigma * (x / sigma + primitive(2) - primitive(1))
    half = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)  # equal steps: h / (2 h_previous)
    args = (x, estimate(1), estimate(0), alpha, sigma, next_alpha, next_sigma)
    second = (samplers.dpmpp_2m_step(*args, half) - exact).abs()
    first = (samplers.dpmpp_2m_step(*args, 0 * half) - exact).abs()
    assert second < first / 10


def test_lcm_mixes_skip_and_output_then_adds_noise() -> None:
    x, x0, noise = (torch.full((1, 1, 1, 1), value) for value in (2.0, 3.0, 5.0))
    skip, out, alpha, sigma = (torch.full((1, 1, 1, 1), value) for value in (0.25, 0.5, 0.8, 0.6))
    assert samplers.lcm_step(x, x0, noise, skip, out, alpha, sigma).item() == pytest.approx(0.8 * (0.5 + 1.5) + 3.0)


def test_guidance_is_per_sample() -> None:
    conditional, unconditional = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    scale = torch.tensor([0.0, 1.0, 7.5]).view(-1, 1, 1, 1)
    assert samplers.guide(conditional, unconditional, scale).flatten().tolist() == [0.0, 1.0, 7.5]
