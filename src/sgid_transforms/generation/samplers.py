"""Diffusion samplers as pure functions over per-sample vectors.

Every function works on latents in the variance-preserving form ``x = alpha * x0 + sigma * noise`` with
``alpha**2 + sigma**2 = 1``, so that one state serves all samplers. ``alpha`` and ``sigma`` belong to the current noise
level, ``next_alpha`` and ``next_sigma`` to the one that the step leads to; all are ``(B, 1, 1, 1)`` tensors, one entry
for each sample, and may differ from sample to sample.
"""

from __future__ import annotations

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Latents at a noise level, from clean latents and unit noise."""
    return alpha * x0 + sigma * noise


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) with a separate scale for each sample."""
    return unconditional + scale * (conditional - unconditional)


def predict_x0(prediction_type: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents according to a model's output; ``prediction_type`` is one of `PREDICTION_TYPES`."""
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x - sigma * output
    return output


def predict_noise(prediction_type: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noise according to a model's output; ``prediction_type`` is one of `PREDICTION_TYPES`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha * output + sigma * x
    return (x - alpha * output) / sigma


def ddim_step(x0: Tensor, noise: Tensor, next_alpha: Tensor, next_sigma: Tensor) -> Tensor:
    """Deterministic DDIM, equation 12 of Song et al. 2020 (arXiv 2010.02502) with eta = 0."""
    return next_alpha * x0 + next_sigma * noise


def euler_step(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, next_alpha: Tensor, next_sigma: Tensor) -> Tensor:
    """Euler's method on the probability flow ODE, algorithm 2 of Karras et al. 2022 (arXiv 2206.00364), without churn."""
    level, next_level = sigma / alpha, next_sigma / next_alpha  # sigmas of the variance-exploding form
    exploding = x / alpha
    slope = (exploding - x0) / level
    return next_alpha * (exploding + slope * (next_level - level))


def dpmpp_2m_step(
    x: Tensor,
    x0: Tensor,
    previous_x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    next_alpha: Tensor,
    next_sigma: Tensor,
    extrapolation: Tensor,
) -> Tensor:
    """DPM-Solver++(2M) with the midpoint rule (Lu et al. 2022, arXiv 2211.01095).

    ``extrapolation`` is ``h / (2 * h_previous)``, the ratio of two steps in log-SNR; at 0 the step is of first order and
    ``previous_x0``, the clean latents of the step before, is not used.
    """
    decay = next_sigma / sigma
    gain = next_alpha - alpha * decay  # next_alpha * (1 - exp(-h)), finite where next_sigma is 0
    return decay * x + gain * (x0 + extrapolation * (x0 - previous_x0))


def lcm_step(
    x: Tensor, x0: Tensor, noise: Tensor, c_skip: Tensor, c_out: Tensor, next_alpha: Tensor, next_sigma: Tensor
) -> Tensor:
    """Multistep consistency sampling, algorithm 3 of Luo et al. 2023 (arXiv 2310.04378): denoise, then noise again."""
    return next_alpha * (c_skip * x + c_out * x0) + next_sigma * noise
