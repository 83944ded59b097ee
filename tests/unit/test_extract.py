"""An adapter out of two sets of weights."""

import pytest
import torch

from zturbo.errors import ZTurboError
from zturbo.extract import extract, low_rank
from zturbo.lorafile import module_targets

TARGETS = [module_targets("layers.0.attention.qkv", 24, 48), module_targets("layers.0.feed_forward.w1", 24, 40)]
PARTS = {part.name: (part.size, target.in_features) for target in TARGETS for part in target.parts}


def weights(seed, rank=None):
    random = torch.Generator().manual_seed(seed)
    if rank is None:
        return {name: torch.randn(shape, generator=random) for name, shape in PARTS.items()}
    return {
        name: torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)
        for name, (rows, columns) in PARTS.items()
    }


def test_a_difference_of_that_rank_comes_back_whole():
    turbo, change = weights(1), weights(2, rank=3)
    found = extract(lambda name: turbo[name] + change[name], turbo.__getitem__, TARGETS, 3)
    assert set(found.factors) == set(PARTS) and found.error < 1e-3 and found.alike == 0
    for name, one in found.factors.items():
        assert one.rank == 3 and one.scale == 1
        torch.testing.assert_close(one.delta(), change[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.A.norm(), one.B.norm(), rtol=1e-3, atol=0)  # split evenly


def test_the_error_is_what_the_rank_leaves_out():
    turbo, change = weights(1), weights(3)
    found = extract(lambda name: turbo[name] + change[name], turbo.__getitem__, TARGETS, 4)
    left = {name: (change[name] - one.delta()).norm() for name, one in found.factors.items()}
    whole = torch.stack([tensor.norm() for tensor in change.values()]).norm()
    assert found.error == pytest.approx((torch.stack(list(left.values())).norm() / whole).item(), rel=1e-3)
    name, worst = found.worst
    assert worst == pytest.approx(max((left[key] / change[key].norm()).item() for key in left), rel=1e-3) and left[
        name
    ] / change[name].norm() == pytest.approx(worst, rel=1e-3)
    assert f"{found.error:.1%}" in found.report(4) and name in found.report(4) and "higher rank" in found.report(4)


def test_parts_that_are_alike_are_left_out_and_two_like_models_refused():
    turbo, change = weights(1), weights(2, rank=2)
    change["layers.0.attention.to_k"].zero_()
    found = extract(lambda name: turbo[name] + change[name], turbo.__getitem__, TARGETS, 2)
    assert (
        found.alike == 1
        and "layers.0.attention.to_k" not in found.factors
        and "1 matrices are the same" in found.report(2)
    )
    with pytest.raises(ZTurboError, match="the same in every matrix"):
        extract(turbo.__getitem__, turbo.__getitem__, TARGETS, 2)


def test_large_matrices_by_random_projections_are_nearly_as_near():
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(640, 1200, generator=random) @ torch.diag(0.99 ** torch.arange(1200.0))
    U, S, Vh = low_rank(matrix, 16)
    best = torch.linalg.svdvals(matrix)[:16]
    torch.testing.assert_close(S, best, rtol=1e-2, atol=0)
    assert (matrix - U * S @ Vh).norm() <= 1.002 * (matrix.square().sum() - best.square().sum()).sqrt()


def test_the_report_names_the_worst_part_also_where_nothing_is_left_out():
    change = {
        name: torch.zeros(shape).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(2.0))
        for name, shape in PARTS.items()
    }
    whole = extract(change.__getitem__, lambda name: torch.zeros(PARTS[name]), TARGETS, 1)
    assert whole.worst == (next(iter(PARTS)), 0.0) and f"most in {whole.worst[0]}, 0.0%" in whole.report(1)


def test_numbers_that_are_none_and_other_shapes_get_a_sentence():
    turbo = weights(1)
    with pytest.raises(ZTurboError, match="numbers that are none"):
        extract(lambda name: turbo[name] * float("nan"), turbo.__getitem__, TARGETS, 2)
    with pytest.raises(ZTurboError, match="not of one family"):
        extract(lambda name: turbo[name][:5], turbo.__getitem__, TARGETS, 2)
