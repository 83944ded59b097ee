"""zturbo.flow against the equations of FIELD and the papers, written out."""

import math

import pytest
import torch

from zturbo import flow


def test_turbo_grid_is_the_eight_step_grid_of_scheduler_simple_at_shift_3():
    expected = [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0]
    assert torch.allclose(flow.sampling_sigmas(8, 3.0), torch.tensor(expected), atol=1e-6)


def test_noise_and_velocity_are_the_straight_path():
    x0, eps = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    sigma = torch.tensor([0.25, 0.75])
    x = flow.add_noise(x0, eps, sigma)
    assert torch.allclose(x[0], 0.75 * x0[0] + 0.25 * eps[0])
    # stepping from sigma to 0 along the target velocity lands on the picture
    assert torch.allclose(x - sigma.view(-1, 1, 1, 1) * flow.velocity_target(x0, eps), x0, atol=1e-6)


def test_loss_weights_each_picture():
    v, target = torch.zeros(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 2.0)])
    assert flow.velocity_loss(v, target, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([1 * 1, 0.5 * 4])


@pytest.mark.parametrize(
    "density, mean",
    [
        ("linear", 0.5),
        ("weighted", 0.5),
        ("sigmoid", 0.5),
        ("content", 0.75),
        ("style", 0.25),
        ("shift", 1.5 - 0.75 * math.log(3)),
    ],
)
def test_densities_have_the_mean_of_their_formula(density, mean):
    """E[1-u^3] = 3/4, E[u^3] = 1/4, E[3u/(1+2u)] = 3/2 - 3/4 ln 3."""
    sigma = flow.sample_sigma(density, 200_000, flow.generator(0), 3.0)
    assert sigma.mean().item() == pytest.approx(mean, abs=4e-3)
    assert sigma.min() > 0 and sigma.max() < 1.0001


def test_logit_normal_has_its_mean_and_spread():
    logits = torch.logit(flow.sample_sigma("logit_normal", 200_000, flow.generator(0), 3.0, 0.7, 0.5))
    assert abs(logits.mean().item() - 0.7) < 0.01 and abs(logits.std().item() - 0.5) < 0.01


def test_unknown_density_is_named():
    with pytest.raises(ValueError, match="'gauss'.*weighted"):
        flow.sample_sigma("gauss", 1, flow.generator(0), 3.0)


def test_weighted_curve_goes_through_the_reference_points_and_has_mean_one():
    points = {0: 0.906, 124: 1.523, 450: 1.0, 800: 0.716, 999: 0.447}
    for index, value in points.items():
        sigma = torch.tensor([1 - index / 1000])
        assert flow.loss_weight("weighted", sigma).item() == pytest.approx(value, abs=2e-3)
    assert flow.loss_weight("weighted", torch.linspace(0.001, 1, 10_000)).mean().item() == pytest.approx(1.0, abs=0.02)
    assert flow.loss_weight("sigmoid", torch.rand(4)).tolist() == [1.0] * 4


def test_randomness_is_a_function_of_its_counters_alone():
    torch.manual_seed(1)
    first = torch.randn(4, generator=flow.generator(7, "step", 3))
    torch.manual_seed(2)
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=flow.generator(7, "step", 3)))
    assert not torch.equal(first, torch.randn(4, generator=flow.generator(7, "step", 4)))


def test_weightings_are_their_formulas():
    sigma = torch.tensor([0.1, 0.5, 0.9])
    curve = flow.loss_weight("weighted", sigma)
    assert torch.equal(flow.loss_weight("sigmoid", sigma), torch.ones(3)) and torch.equal(
        flow.loss_weight("sigmoid", sigma, "weighted"), curve
    )
    assert torch.equal(flow.loss_weight("weighted", sigma, "none"), torch.ones(3)) and not torch.equal(
        curve, torch.ones(3)
    )
    assert flow.loss_weight("linear", sigma, "x0").tolist() == pytest.approx([0.01, 0.25, 0.81])
    u = torch.linspace(0, 1, 100001, dtype=torch.float64)
    assert flow.loss_weight("linear", u, "cosmap").mean().item() == pytest.approx(1, abs=1e-3)  # a density
