"""The reference values: of public accountants, of closed forms, and of what a careless accountant would say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SampledWithoutReplacementDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.privacy.analytic import analytic_gaussian_epsilon
from fedml_core.privacy.losses import Piece, loss_epsilon
from tests.fedml_core.privacy.accounting_cases import (
    composed,
    fixed_size,
    gaussian,
    integer_sum,
    laplace,
    local,
    matrix,
    poisson,
    repeated,
    shuffled,
    tree,
)

# Trust: the claim holds if the events are what happened: noise of that size, and samples that nobody else knew.
# Trust: an event says what its author did; nothing here can see whether noise was really drawn.
# Trust: a tree or matrix event must come from a schedule that does not depend on the data.
ADD, ONE, SPECIAL = "add-or-remove-one", "replace-one", "replace-special"
MNIST = repeated(14_040, poisson(256 / 60_000, gaussian(1.1)))


def claim(*events: dict[str, Any], adjacency: str = ADD, delta: float = 1e-5, **more: Any) -> Claim:
    return epsilon_of(events, delta=delta, unit="client", adjacency=adjacency, **more)


def epsilon(*events: dict[str, Any], adjacency: str = ADD, delta: float = 1e-5) -> float:
    return claim(*events, adjacency=adjacency, delta=delta).epsilon


# an epsilon is never below the exact one of the events.
# an epsilon is the exact one or above it; the grid's spacing adds less than 0.1 % in the reference cases.
@pytest.mark.parametrize(
    ("events", "adjacency", "delta", "expected"),
    [
        ([gaussian(1.0)], ADD, 1e-5, 4.3772),
        ([repeated(100, gaussian(10.0))], ADD, 1e-5, 4.3772),
        ([laplace(1.0)], ADD, 1e-5, 0.99998),
        ([repeated(10, laplace(10.0))], ADD, 1e-5, 0.98996),
        ([repeated(1000, poisson(0.01, gaussian(1.0)))], ADD, 1e-5, 1.8282),
        ([MNIST], ADD, 1e-5, 2.3796),
        ([repeated(100, poisson(0.1, gaussian(1.0)))], ADD, 1e-5, 7.0466),
        ([repeated(100, poisson(0.1, gaussian(1.0)))], ONE, 1e-5, 10.516),
        ([repeated(100, gaussian(1.0))], ADD, 1e-5, 91.817),
        ([gaussian(1.0)], ONE, 1e-5, 9.9973),
        ([local(1.0)], ONE, 1e-5, 9.9973),
        ([repeated(100, fixed_size(100, 1000, gaussian(2.0)))], ONE, 1e-5, 14.0538),
        ([repeated(100, fixed_size(100, 1000, gaussian(1.0)))], ONE, 1e-5, 83.937),
        ([tree(7.0, 1600)], SPECIAL, 1e-6, 2.2811),
        ([tree(5.0, 1000)], SPECIAL, 1e-6, 3.1311),
    ],
    ids=str,
)
def test_reference_values_are_met_and_not_undercut(
    events: list[dict[str, Any]], adjacency: str, delta: float, expected: float
) -> None:
    # Half a unit of the last digit that is printed in the reference, below; 0.1 % above.
    digits = len(f"{expected}".partition(".")[2])
    found = epsilon(*events, adjacency=adjacency, delta=delta)
    assert expected - 0.5 * 10**-digits <= found <= expected * 1.001


def test_rows_that_a_careless_accountant_gets_wrong() -> None:
    # Renyi curves of dp-accounting ignore the adjacency of Gaussian noise: 4.7285 instead of 9.9973.
    assert epsilon(gaussian(1.0), adjacency=ONE) >= 9.99
    # The noise of a fixed-size sample is over twice the clip norm: 83.9 instead of 14.05.
    assert epsilon(repeated(100, fixed_size(100, 1000, gaussian(1.0))), adjacency=ONE) >= 83
    # A central limit theorem says 1.6177.
    assert epsilon(repeated(1000, poisson(0.01, gaussian(1.0)))) >= 1.828


# Fixed-size sampling counts its noise over twice one unit's bound: a replaced unit moves the sum by that much.
def test_fixed_size_sampling_agrees_with_dp_accounting_at_twice_the_sensitivity() -> None:
    theirs = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    theirs.compose(SampledWithoutReplacementDpEvent(500, 20, GaussianDpEvent(1.5 / 2)), 30)
    ours = epsilon(repeated(30, fixed_size(20, 500, gaussian(1.5))), adjacency=ONE)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-3)


# Under replace-one every bound on one unit's influence counts twice.
@pytest.mark.parametrize("event", [gaussian, laplace, lambda z: tree(z, 8), lambda z: matrix(z, 1.5)])
def test_replace_one_costs_what_half_the_noise_costs(event: Any) -> None:
    assert epsilon(event(2.0), adjacency=ONE) == pytest.approx(epsilon(event(1.0), adjacency=SPECIAL), rel=1e-9)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.02, 0.6, 50), (0.5, 4.0, 200), (0.001, 0.8, 5000)])
@pytest.mark.parametrize("adjacency", [ADD, ONE])
def test_poisson_sampling_agrees_with_dp_accounting(rate: float, noise: float, count: int, adjacency: str) -> None:
    theirs = PLDAccountant(
        NeighboringRelation.ADD_OR_REMOVE_ONE if adjacency == ADD else NeighboringRelation.REPLACE_ONE
    )
    theirs.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count)
    ours = epsilon(repeated(count, poisson(rate, gaussian(noise))), adjacency=adjacency)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-3)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (30.0, 1000), (100.0, 50)])
def test_grids_do_not_undercut_the_closed_form(noise: float, count: int, delta: float) -> None:
    # A sampling probability next to 1 goes through the grid and its convolutions; 1 itself is exact.
    exact = analytic_gaussian_epsilon(noise / math.sqrt(count), delta)
    found = loss_epsilon([Piece("gaussian", noise, 1 - 1e-9, count)], delta, ADD)
    assert exact <= found <= exact * 1.001


# A delta too small, an epsilon too large or too many releases for a grid give infinity, never a guess.
def test_what_no_grid_can_hold_falls_back_to_an_upper_bound() -> None:
    rounds = repeated(1000, poisson(0.1, gaussian(1.0)))
    assert loss_epsilon([Piece("gaussian", 1.0, 0.1, 1000)], 1e-13, ADD) == math.inf
    assert loss_epsilon([Piece("gaussian", 1e-4, 0.1, 1000)], 1e-5, ADD) == math.inf
    small = claim(rounds, delta=1e-13)
    assert small.accountant == "rdp" and small.epsilon > claim(rounds, delta=1e-10).epsilon
    assert math.isfinite(epsilon(repeated(1000, poisson(0.1, gaussian(1e-4)))))
    with pytest.raises(PrivacyError, match="no finite epsilon"):
        claim(rounds, delta=1e-13, adjacency=ONE)


def test_pure_laplace_noise_has_its_closed_form() -> None:
    # delta(eps) = 1 - exp((eps - 1/b) / 2)
    for scale in (0.5, 2.0, 20.0):
        exact = 1 / scale + 2 * math.log1p(-1e-3)
        assert exact <= epsilon(laplace(scale), delta=1e-3) <= exact * 1.001


def test_gaussian_noise_composes_to_gaussian_noise_whatever_it_is_called() -> None:
    all_of_them = [gaussian(2.0), matrix(3.0, 1.5), shuffled(gaussian(4.0)), repeated(2, gaussian(5.0))]
    ratio = (1 / 4 + 1 / 4 + 1 / 16 + 2 / 25) ** -0.5
    found = claim(*all_of_them, adjacency=SPECIAL)
    assert found.epsilon == pytest.approx(analytic_gaussian_epsilon(ratio, 1e-5), rel=1e-9)
    assert found.accountant == "analytic-gaussian"


def test_two_gaussian_answers_from_one_sample_are_one_with_less_noise() -> None:
    # An adaptive clip spends part of the noise on its counter: z^-2 = z_delta^-2 + (2 sigma_b)^-2.
    counter = 2 * 100 / 20
    values = (1.0 - counter**-2) ** -0.5
    assert values == pytest.approx(1.005038, abs=1e-6)
    split = repeated(100, poisson(0.1, composed(gaussian(values), gaussian(counter))))
    assert epsilon(split) == pytest.approx(epsilon(repeated(100, poisson(0.1, gaussian(1.0)))), rel=1e-6)
    assert epsilon(split) > epsilon(repeated(100, poisson(0.1, gaussian(values))))


def test_a_list_with_something_that_has_no_loss_distribution_goes_through_renyi_curves() -> None:
    rounds = repeated(20, poisson(0.1, gaussian(1.0)))
    mixed = claim(rounds, integer_sum("skellam-sum"))
    assert (mixed.accountant, mixed.sampling) == ("rdp", "none+poisson")
    assert mixed.epsilon > max(epsilon(rounds), epsilon(integer_sum("skellam-sum")))
    both = claim(repeated(5, poisson(0.2, composed(gaussian(1.0), laplace(2.0)))))
    assert both.accountant == "rdp" and both.epsilon > epsilon(repeated(5, poisson(0.2, gaussian(1.0))))


def test_laplace_and_gaussian_noise_share_a_grid() -> None:
    found = claim(poisson(0.1, laplace(1.0)), laplace(2.0), repeated(3, poisson(0.1, gaussian(1.0))))
    assert found.accountant == "pld"
    assert found.epsilon > claim(laplace(2.0)).epsilon
    assert claim(laplace(2.0), gaussian(2.0), adjacency=ONE).epsilon > claim(laplace(1.0)).epsilon


def test_a_tree_that_is_begun_anew_costs_as_often() -> None:
    assert epsilon(tree(8.0, 15, restarts=3), adjacency=SPECIAL) == pytest.approx(
        epsilon(repeated(4, tree(8.0, 15)), adjacency=SPECIAL)
    )
    # 15 leaves are under 4 nodes each, 16 under 5.
    assert epsilon(tree(8.0, 16), adjacency=SPECIAL) > epsilon(tree(8.0, 15), adjacency=SPECIAL)
    assert epsilon(tree(8.0, 15), adjacency=SPECIAL) == epsilon(tree(8.0, 8), adjacency=SPECIAL)


def test_ten_rounds_of_one_epoch_cost_one_run_of_ten_epochs() -> None:
    step = poisson(1 / 20, gaussian(1.2))
    rounds = [repeated(20, step) for _ in range(10)]
    assert epsilon(*rounds) == epsilon(repeated(200, step)) == epsilon(*([step] * 200))
    # An accountant that is made anew each round says the cost of one.
    assert epsilon(*rounds) > 1.5 * epsilon(rounds[0])


def test_a_ledger_read_from_disk_costs_what_it_cost_before() -> None:
    import json

    spent = [poisson(0.1, gaussian(1.0))] * 7 + [gaussian(3.0)]
    again = json.loads(json.dumps(spent))
    assert epsilon(*again) == epsilon(*spent)


def test_more_rounds_never_cost_less() -> None:
    costs = [epsilon(repeated(count, poisson(0.05, gaussian(0.9)))) for count in (1, 2, 10, 100, 1000)]
    assert costs == sorted(costs) and len(set(costs)) == 5


def test_shuffled_batches_are_counted_without_amplification() -> None:
    found = claim(repeated(100, shuffled(gaussian(10.0))))
    assert found.epsilon == pytest.approx(4.3772, abs=1e-4)
    assert found.sampling == "shuffled" and "without amplification" in found.notes[0]
    assert found.epsilon > 3 * epsilon(repeated(100, poisson(0.1, gaussian(10.0))))


def test_shuffled_batches_claimed_as_poisson_are_refused() -> None:
    with pytest.raises(PrivacyError, match="poisson sampling was claimed and the events say shuffled"):
        claim(repeated(100, shuffled(gaussian(1.0))), sampling="poisson")
    with pytest.raises(PrivacyError, match="the events say none"):
        claim(gaussian(1.0), sampling="poisson")
    with pytest.raises(PrivacyError, match="no theorem says what poisson sampling of the event shuffled"):
        claim(poisson(0.1, shuffled(gaussian(1.0))))
    assert claim(poisson(0.1, gaussian(1.0)), sampling="poisson").sampling == "poisson"


# What nothing can account for raises PrivacyError; it is never counted as zero.
# where no theorem covers an event under an adjacency, that is a PrivacyError which names both.
@pytest.mark.parametrize(
    ("event", "adjacency", "said"),
    [
        (fixed_size(1, 10, gaussian(1.0)), ADD, "fixed-size sampling is accounted under replace-one, not under add-or"),
        (fixed_size(1, 10, gaussian(1.0)), SPECIAL, "not under replace-special"),
        (fixed_size(10, 10, gaussian(1.0)), ADD, "not under add-or-remove-one"),
        (tree(1.0, 8), ADD, "the event tree has a schedule.*not add-or-remove-one"),
        (matrix(1.0, 2.0), ADD, "the event matrix has a schedule.*not add-or-remove-one"),
        (local(1.0), ADD, "claim replace-one for it, not add-or-remove-one"),
        (local(1.0), SPECIAL, "claim replace-one for it, not replace-special"),
        (poisson(0.1, laplace(1.0)), ONE, "no Rényi curve is known for poisson sampling under replace-one"),
        (composed(tree(1.0, 8), poisson(0.1, gaussian(1.0))), ONE, "poisson sampling under replace-one"),
        ({"name": "free"}, ADD, "nothing can account for an event named 'free'"),
    ],
)
def test_what_nothing_accounts_for_is_an_error(event: dict[str, Any], adjacency: str, said: str) -> None:
    for events in ([event], [gaussian(1.0), event]):
        with pytest.raises(PrivacyError, match=said):
            claim(*events, adjacency=adjacency)


def test_nothing_done_costs_nothing() -> None:
    found = claim()
    assert (found.epsilon, found.sampling) == (0.0, "none")


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta must be"):
        claim(gaussian(1.0), delta=delta)


def test_an_unknown_unit_or_adjacency_is_refused() -> None:
    with pytest.raises(PrivacyError, match="unit must be one of client, example, got 'user'"):
        epsilon_of([gaussian(1.0)], delta=1e-5, unit="user", adjacency=ADD)
    with pytest.raises(PrivacyError, match="adjacency must be one of"):
        epsilon_of([gaussian(1.0)], delta=1e-5, unit="client", adjacency="bounded")


def test_a_delta_that_allows_publishing_one_unit_is_noted() -> None:
    assert claim(gaussian(1.0), population=99_999).notes == ()
    assert "not below 1/100000" in claim(gaussian(1.0), population=100_000).notes[0]
    assert "not below 1/1000:" in claim(fixed_size(10, 1000, gaussian(1.0)), adjacency=ONE, delta=1e-3).notes[0]


def test_a_claim_says_all_that_it_is_about() -> None:
    found = claim(repeated(100, poisson(0.1, gaussian(1.0))))
    assert found.to_json() == {
        "epsilon": found.epsilon,
        "delta": 1e-5,
        "unit": "client",
        "adjacency": ADD,
        "sampling": "poisson",
        "accountant": "pld",
        "notes": [],
    }
    assert str(Claim(7.04661, 1e-5, "client", ADD, "poisson", "pld")) == (
        "epsilon 7.0467 at delta 1e-05 (unit client, add-or-remove-one, sampling poisson, accountant pld)"
    )


def test_ten_thousand_rounds_are_folded_before_they_are_accounted_for() -> None:
    spent = [poisson(0.01, gaussian(1.0)) for _ in range(10_000)]
    assert epsilon(*spent) == epsilon(repeated(10_000, poisson(0.01, gaussian(1.0))))


def test_noise_at_the_ends_of_its_range_has_an_answer() -> None:
    for noise in (1e-9, 1e-3, 1e6, 1e15):
        found = [epsilon(gaussian(noise)), epsilon(poisson(0.1, gaussian(noise))), epsilon(laplace(noise))]
        found.append(epsilon(fixed_size(1, 10, gaussian(noise)), adjacency=ONE))
        assert np.all(np.isfinite(found)) and min(found) >= 0
