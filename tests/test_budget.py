"""A bound on KL decides the density."""

from glass_mlx.budget import Budget
from glass_mlx.prior.curves import Curve

import pytest

CURVE = Curve((0.5, 0.75, 0.9), (0.8, 0.2, 0.05), (0.0, 0.0, 0.0))


@pytest.mark.parametrize("max_kl", [0.06, 0.1, 0.3])
def test_the_smallest_density_within_the_bound_is_kept(max_kl):
    budget = Budget.spend(max_kl, CURVE)
    assert budget.max_kl == max_kl
    assert CURVE.kl_at(budget.density) <= max_kl < CURVE.kl_at(budget.density - 1e-3)


@pytest.mark.parametrize(("max_kl", "density"), [(0.01, 1.0), (0.2, 0.75), (10, 0.5)])
def test_it_is_among_those_whose_cost_is_known(max_kl, density):
    assert Budget.spend(max_kl, CURVE).density == pytest.approx(density, abs=2e-4)
