"""Rectified-flow maths: noising, target, where the timesteps fall, how steps are weighted.

sigma runs from 0 (picture) to 1 (noise). x_t = (1 - sigma) x0 + sigma eps, and the model predicts the
velocity v = eps - x0 (arXiv 2209.03003). Everything random comes from counters (`generator`), so a step
is a function of (seed, step) and of nothing that ran before it.
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F

DENSITIES = ("weighted", "sigmoid", "linear", "shift", "content", "style", "logit_normal")

WEIGHTINGS = ("auto", "none", "weighted", "cosmap", "x0")

# ostris/ai-toolkit's "weighted" loss curve over i = (1 - sigma) * 1000, mean 1.
# fmt: off
_WEIGHT_INDEX = (
    0, 50, 100, 124, 150, 200, 250, 300, 350, 400, 450, 500,
    550, 600, 650, 700, 750, 800, 850, 900, 950, 975, 990, 999,
)
_WEIGHT_VALUE = (
    .906, 1.375, 1.507, 1.523, 1.507, 1.441, 1.355, 1.264, 1.172, 1.083, 1.000, .925,
    .860, .805, .762, .731, .715, .716, .729, .716, .582, .493, .452, .447,
)
# fmt: on


def generator(*counters) -> torch.Generator:
    """A CPU generator that is a function of its counters (ints and strings) alone."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """s' = shift s / (1 + (shift - 1) s), the resolution shift of SD3 (arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_sigmas(steps: int, shift: float) -> torch.Tensor:
    """[steps + 1] sigmas from 1 to 0, evenly spaced before the shift: what previews and samplers draw with."""
    even = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return torch.cat((shift_sigma(even, shift).float(), torch.zeros(1)))


def sample_sigma(
    density: str, count: int, random: torch.Generator, shift: float, mean: float = 0.0, std: float = 1.0
) -> torch.Tensor:
    """[count] training sigmas in (0, 1) by the reference trainer's names.

    mean, std: of logit_normal, in logits (arXiv 2403.03206). shift: of the density "shift". Raises ValueError for an
    unknown name.
    """
    if density == "sigmoid":
        return torch.sigmoid(torch.randn(count, generator=random))
    if density == "logit_normal":
        return torch.sigmoid(mean + std * torch.randn(count, generator=random))
    u = torch.rand(count, generator=random).clamp(1e-4, 1 - 1e-4)
    if density in ("linear", "weighted"):
        return u
    if density == "shift":
        return shift_sigma(u, shift)
    if density == "content":  # high noise: what is where
        return 1 - u**3
    if density == "style":  # low noise: how it is drawn
        return (u**3).clamp_min(1e-4)
    raise ValueError(f"Unknown timestep choice {density!r}; choose one of {', '.join(DENSITIES)}.")


def loss_weight(density: str, sigma: torch.Tensor, weighting: str = "auto") -> torch.Tensor:
    """[B] factors on the loss at sigma [B], by name.

    auto: the reference's curve for the density "weighted", 1 otherwise. none: 1. weighted: the reference's curve.
    cosmap: SD3's (arXiv 2403.03206), high in the middle. x0: sigma squared, the square error of the picture instead
    of the velocity's, as core's trainer has it.
    """
    if weighting == "cosmap":
        return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    if weighting == "x0":
        return sigma**2
    if weighting == "none" or (weighting == "auto" and density != "weighted"):
        return torch.ones_like(sigma)
    found = np.interp((1 - sigma.cpu().numpy()) * 1000, _WEIGHT_INDEX, _WEIGHT_VALUE)
    return torch.from_numpy(found).to(sigma)


def add_noise(x0: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_t [B, C, H, W] for sigma [B]."""
    s = sigma.view(-1, 1, 1, 1)
    return (1 - s) * x0 + s * eps


def velocity_target(x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """v = eps - x0."""
    return eps - x0


def guided_target(v: torch.Tensor, target: torch.Tensor, scale: float) -> torch.Tensor:
    """Differential guidance: the target, `scale` times as far away from the prediction."""
    return v.detach().float() + scale * (target.float() - v.detach().float())


def velocity_loss(
    v: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    huber_delta: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B]: weight * error of each picture.

    v, target: [B, C, H, W]; weight: [B]; mask: [B, 1, H, W], of mean 1 in each picture.

    The error is the mean square, or with `huber_delta` the Huber loss, doubled and so the square where it is small.
    """
    v, target = v.float(), target.float()
    error = (
        (v - target).square()
        if huber_delta is None
        else 2 * F.huber_loss(v, target, reduction="none", delta=huber_delta)
    )
    return (error if mask is None else error * mask).mean(dim=(1, 2, 3)) * weight
