"""A bound on KL is spent on what saves the most bytes."""

from glass_mlx.budget import spend
from glass_mlx.config import Shares
from glass_mlx.prior.curves import Curve, Curves

import pytest

DENSITY = Curve((0.5, 0.75, 0.9), (0.8, 0.2, 0.05))
VOCABULARY = Curve((0.125, 0.25, 0.5), (0.1, 0.04, 0.004))


def read(shares, neurons, head):
    return shares.density * neurons + shares.vocabulary * head


@pytest.mark.parametrize("max_kl", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(("neurons", "head"), [(100, 50), (100, 1), (1, 100)])
def test_no_other_shares_within_the_bound_read_fewer_bytes(max_kl, neurons, head):
    budget = spend(max_kl, Curves(DENSITY, VOCABULARY), neurons, head)
    spent = DENSITY.kl_at(budget.shares.density) + VOCABULARY.kl_at(budget.shares.vocabulary)
    assert spent <= max_kl
    assert budget.density_kl == DENSITY.kl_at(budget.shares.density)
    assert budget.density_kl + budget.vocabulary_kl == pytest.approx(max_kl)
    for vocabulary in (0.125, 0.25, 0.5, 0.75, 1.0):
        for density in (0.5, 0.6, 0.75, 0.8, 0.9, 0.95, 1.0):
            if DENSITY.kl_at(density) + VOCABULARY.kl_at(vocabulary) <= max_kl:
                least = read(budget.shares, neurons, head)
                assert least <= read(Shares(density, vocabulary), neurons, head) + 0.02 * head


def test_a_head_that_cannot_be_sliced_stays_whole():
    budget = spend(0.2, Curves(DENSITY, None), 100, 50)
    assert budget.shares == Shares(pytest.approx(0.75, abs=2e-4), 1.0)


def test_the_cheaper_part_is_cut_first():
    assert spend(0.004, Curves(DENSITY, VOCABULARY), 1, 100).shares.vocabulary == 0.5
    assert spend(10, Curves(DENSITY, VOCABULARY), 100, 50).shares == Shares(0.5, 0.125)
