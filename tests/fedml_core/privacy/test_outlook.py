from __future__ import annotations

import math
import re

import pytest

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.outlook import Release, outlook, with_noise_times
from tests.fedml_core.privacy.accounting_cases import composed, fixed_size, gaussian, integer_sum, laplace, poisson

# Trust: the outlook is as good as the event it is given: it must be the one that the run will write.
ROUND = gaussian(10.0)


# the cost after a round is what epsilon_of says of that many rounds' events.
def test_costs_are_those_of_the_rounds_so_far() -> None:
    event = poisson(0.1, gaussian(1.0))
    found = outlook(event, 30, delta=1e-5, unit="client", adjacency="add-or-remove-one")
    assert [number for number, _ in found.claims] == [1, *range(3, 31, 3)]
    for number, claim in (found.claims[0], found.claims[-1]):
        assert claim == epsilon_of([event] * number, delta=1e-5, unit="client", adjacency="add-or-remove-one")
    assert found.advice == () and found.release is None


def test_a_single_round_has_one_cost() -> None:
    found = outlook(ROUND, 1, delta=1e-5, unit="example", adjacency="add-or-remove-one")
    assert [(number, claim.unit) for number, claim in found.claims] == [(1, "example")]


# Noise and signal are those of one round's mean over the fixed expected cohort, whoever drops out.
def test_signal_and_noise_are_those_of_the_mean() -> None:
    release = Release(clip_norm=0.5, noise_multiplier=2.0, expected_cohort=100, parameters=10_000)
    assert release.noise_per_coordinate == pytest.approx(2.0 * 0.5 / 100)
    assert release.noise_norm == pytest.approx(0.01 * 100)
    assert release.aligned_signal_to_noise == pytest.approx(0.5)
    assert release.independent_signal_to_noise == pytest.approx(0.05)


def test_noise_above_the_signal_says_what_makes_them_equal() -> None:
    release = Release(clip_norm=0.5, noise_multiplier=2.0, expected_cohort=100, parameters=10_000)
    (said,) = outlook(ROUND, 5, delta=1e-5, unit="client", adjacency="add-or-remove-one", release=release).advice
    assert "2 times as large" in said and "cohort of 200 instead of 100" in said
    assert "2500 parameters instead of 10000" in said
    for cohort, parameters in ((200, 10_000), (100, 2500)):
        assert Release(0.5, 2.0, cohort, parameters).aligned_signal_to_noise == pytest.approx(1.0)
    quiet = Release(0.5, 2.0, 200, 10_000)
    assert outlook(ROUND, 5, delta=1e-5, unit="client", adjacency="add-or-remove-one", release=quiet).advice == ()


def test_a_budget_that_is_broken_says_how_many_rounds_fit_and_how_much_noise_would_do() -> None:
    found = outlook(ROUND, 400, delta=1e-5, unit="client", adjacency="add-or-remove-one", budget=4.377179)
    (said,) = found.advice
    # 100 rounds at 10 times the noise are one round at 1, which costs 4.377178.
    assert said.startswith("400 rounds cost 9.9973, which is more than the budget of 4.37718; 100 fit, or all of them")
    factor = re.search(r"with (\d\.\d+) times the noise", said)
    assert factor is not None and 2.0 <= float(factor[1]) <= 2.001


def test_a_budget_that_is_kept_says_so() -> None:
    found = outlook(ROUND, 100, delta=1e-5, unit="client", adjacency="add-or-remove-one", budget=5.0)
    assert found.advice == ("all 100 rounds fit into the budget: 4.3772 of 5",)


def test_notes_on_the_claim_are_passed_on() -> None:
    event = fixed_size(10, 1000, gaussian(1.0))
    found = outlook(event, 2, delta=1e-2, unit="client", adjacency="replace-one")
    assert "not below 1/1000" in found.advice[0]


def test_more_noise_reaches_every_noise_and_nothing_else() -> None:
    event = poisson(0.1, composed(gaussian(1.0), laplace(2.0), integer_sum("skellam-sum", local_noise=3.0, scale=7.0)))
    more = with_noise_times(event, 2.0)
    parts = more["event"]["events"]
    assert more["sampling_probability"] == 0.1
    assert (parts[0]["noise_multiplier"], parts[1]["scale"]) == (2.0, 4.0)
    assert (parts[2]["local_noise"], parts[2]["scale"], parts[2]["l2"]) == (6.0, 7.0, 1.0)
    assert event["event"]["events"][0] == gaussian(1.0)


def test_an_outlook_is_plain_json() -> None:
    found = outlook(
        ROUND, 2, delta=1e-5, unit="client", adjacency="add-or-remove-one", release=Release(1.0, 1.0, 10, 4)
    )
    told = found.to_json()
    assert [row["round"] for row in told["rounds"]] == [1, 2]
    assert told["aligned_signal_to_noise"] == pytest.approx(5.0) and math.isfinite(told["noise_norm"])
    assert told["rounds"][0]["adjacency"] == "add-or-remove-one"


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="rounds must be >= 1, got 0"):
        outlook(ROUND, 0, delta=1e-5, unit="client", adjacency="add-or-remove-one")
    with pytest.raises(ConfigError, match="budget must be > 0"):
        outlook(ROUND, 1, delta=1e-5, unit="client", adjacency="add-or-remove-one", budget=0.0)
    with pytest.raises(ConfigError, match="expected_cohort must be > 0"):
        Release(1.0, 1.0, 0, 10)
    with pytest.raises(PrivacyError, match="nothing can account for"):
        outlook({"name": "hope"}, 1, delta=1e-5, unit="client", adjacency="add-or-remove-one")
