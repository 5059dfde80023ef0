"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.weighting import Uniform
from server.books import require_accountable
from server.sampling import EveryClient, FixedSampling, MinimumSeparation, PoissonSampling, Sampling
from strategies import CentralDP, FedAvg

SAMPLINGS = [EveryClient(), FixedSampling(5), PoissonSampling(0.3), MinimumSeparation(4)]
NOISE = {"name": "gaussian", "noise_multiplier": 1.0}


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cohort_depends_on_seed_and_round_alone(sampling: Sampling) -> None:
    clients = range(50)
    assert sampling.cohort(clients, 3, 7) == sampling.cohort(clients, 3, 7)
    if sampling != EveryClient():
        assert sampling.cohort(clients, 3, 7) != sampling.cohort(clients, 4, 7)
    if isinstance(sampling, FixedSampling | PoissonSampling):
        assert sampling.cohort(clients, 3, 7) != sampling.cohort(clients, 3, 8)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cohort_names_clients_that_exist_once_each_in_order(sampling: Sampling) -> None:
    clients = [3, 8, 11, 12, 40, 41, 57, 60]
    for round_number in range(1, 30):
        cohort = sampling.cohort(clients, round_number, 0)
        assert cohort == sorted(set(cohort)) and set(cohort) <= set(clients)


def test_fixed_sampling_draws_every_client_equally_often() -> None:
    counts = np.zeros(20)
    for round_number in range(4000):
        cohort = FixedSampling(5).cohort(range(20), round_number, 1)
        assert len(cohort) == 5
        counts[cohort] += 1
    # Each count is near 1000 with standard deviation 27; 5 of those, so that the fixed seed is no lucky one.
    assert np.abs(counts - 1000).max() < 137


def test_poisson_sampling_has_a_binomial_size_and_independent_clients() -> None:
    sizes, pairs = [], 0
    for round_number in range(4000):
        cohort = PoissonSampling(0.3).cohort(range(20), round_number, 1)
        sizes.append(len(cohort))
        pairs += {0, 1} <= set(cohort)
    assert abs(np.mean(sizes) - 6.0) < 0.16 and abs(np.var(sizes) - 4.2) < 0.5
    assert abs(pairs / 4000 - 0.09) < 0.023


@pytest.mark.parametrize(("count", "size"), [(20, 5), (20, 14), (20, 10), (3000, 1500)])
def test_a_hidden_cohort_is_a_uniform_sample_that_its_secret_decides(count: int, size: int) -> None:
    sampling, secret = FixedSampling(size), bytes(range(32))
    rounds = 4000 if count == 20 else 60
    counts, pairs = np.zeros(count), 0
    for round_number in range(rounds):
        cohort = sampling.hidden_cohort(range(100, 100 + count), round_number, secret)
        assert len(set(cohort)) == size and cohort == sorted(cohort)
        counts[np.array(cohort) - 100] += 1
        pairs += {100, 101} <= set(cohort)
    share = size / count
    together = share * (size - 1) / (count - 1)
    assert np.abs(counts / rounds - share).max() < 6 * np.sqrt(share * (1 - share) / rounds)
    assert abs(pairs / rounds - together) < 6 * np.sqrt(together / rounds)
    assert sampling.hidden_cohort(range(count), 7, secret) == sampling.hidden_cohort(range(count), 7, secret)
    assert sampling.hidden_cohort(range(count), 7, secret) != sampling.hidden_cohort(range(count), 7, bytes(32))


class First(FixedSampling):
    """The first clients."""

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the first clients."""
        return list(clients[: self.size])


class Last(Sampling):
    """The last client."""

    def cohort(self, clients: Sequence[int], round_number: int, seed: int) -> list[int]:
        """Return the last client."""
        return list(clients[-1:])


def test_a_rule_that_would_not_hold_for_hidden_cohorts_is_refused_under_privacy() -> None:
    private = CentralDP(
        FedAvg(weighting=Uniform()), clip_norm=1.0, noise_multiplier=1.0, expected_cohort=2.0, delta=1e-5
    )
    assert all(sampling.hides for sampling in (*SAMPLINGS, Last())) and not First(2).hides
    require_accountable(FedAvg(), First(2), 1)
    with pytest.raises(PrivacyError, match="First changes who is asked, and its secret cohorts would follow the class"):
        require_accountable(private, First(2), 1)
    assert Last().hidden_cohort(range(9), 1, bytes(32)) == [8]


def test_a_hidden_cohort_of_everybody_or_nobody_is_drawn_without_end() -> None:
    secret = bytes(32)
    assert FixedSampling(5).hidden_cohort([4, 9], 1, secret) == [4, 9]
    assert FixedSampling(5).hidden_cohort([], 1, secret) == []
    assert len(FixedSampling(100_000).hidden_cohort(range(10_000_000), 1, secret)) == 100_000


def test_a_rate_at_which_nobody_would_ever_be_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="rate must be at least 1e-12, got 1e-300; nobody would ever be asked"):
        PoissonSampling(1e-300)


def test_fixed_sampling_takes_all_when_fewer_can_be_asked() -> None:
    assert FixedSampling(5).cohort([4, 9], 1, 0) == [4, 9]
    assert FixedSampling(5).cohort([], 1, 0) == []


def test_a_cohort_of_a_huge_population_costs_only_itself() -> None:
    class Counted:
        """A population that notices how often it is looked at."""

        looks = 0

        def __len__(self) -> int:
            return 1_000_000_000

        def __getitem__(self, place: int) -> int:
            Counted.looks += 1
            return place

    cohort = FixedSampling(100).cohort(Counted(), 1, 0)  # type: ignore[arg-type]
    assert len(set(cohort)) == 100 and Counted.looks == 100


@pytest.mark.parametrize("rate", [0.02, 0.5, 0.97])
def test_poisson_coins_are_independent_of_their_neighbours_and_of_other_rounds(rate: float) -> None:
    coins = np.zeros((400, 500))
    for number in range(400):
        coins[number, PoissonSampling(rate).cohort(range(500), number, 2**250 + 1)] = 1
    count, spread = coins.size, np.sqrt(rate * (1 - rate))
    assert abs(coins.mean() - rate) < 5 * spread / np.sqrt(count)
    centred = (coins - rate) / spread
    for one, other in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((one * other).mean()) < 5 / np.sqrt(one.size)
    # A gap of k coins has the geometric distribution's variance, not only its mean.
    gaps = np.diff(np.flatnonzero(coins.reshape(-1)))
    assert gaps.var() == pytest.approx((1 - rate) / rate**2, rel=0.15)


def test_poisson_sampling_at_rate_one_asks_everybody_and_at_next_to_nothing_nobody() -> None:
    assert PoissonSampling(1.0).cohort(range(5), 1, 0) == [0, 1, 2, 3, 4]
    assert PoissonSampling(1e-12).cohort(range(10**6), 1, 0) == []
    assert PoissonSampling(0.5).cohort([], 1, 0) == []
    nearly = PoissonSampling(1 - 2**-53).cohort(range(1000), 1, 0)
    assert nearly == list(range(1000))


def test_a_sampling_tells_an_accountant_what_it_is_worth_and_no_more() -> None:
    assert EveryClient().event(100, NOISE) == NOISE
    assert MinimumSeparation(4).event(100, NOISE) == NOISE
    assert PoissonSampling(0.25).event(100, NOISE) == {"name": "poisson", "sampling_probability": 0.25, "event": NOISE}
    told = FixedSampling(5).event(100, NOISE)
    assert told == {"name": "fixed-size", "population": 100, "sample": 5, "event": NOISE}
    assert FixedSampling(5).event(5, NOISE) == NOISE
    assert Sampling.adjacency == PoissonSampling.adjacency == "add-or-remove-one"
    assert FixedSampling.adjacency == "replace-one"


@pytest.mark.parametrize("clients", [range(3, 103), range(7), [5, 9, 2, 33, 6], range(0, 100, 3)])
def test_minimum_separation_keeps_every_client_away_for_that_long(clients: range | list[int]) -> None:
    sampling, last = MinimumSeparation(4), dict[int, int]()
    for number in range(1, 30):
        cohort = sampling.cohort(clients, number, number)
        assert cohort == sorted(cohort) and set(cohort) <= set(clients)
        for client in cohort:
            assert number - last.get(client, -4) >= 4
            last[client] = number
    assert last.keys() == set(clients)
    assert [s.separation for s in SAMPLINGS] == [1, 1, 1, 4]


@pytest.mark.parametrize("clients", [range(3, 103), range(2), [5, 9, 2, 33, 6], range(0, 100, 4)])
def test_no_cohort_has_fewer_or_more_clients_than_its_sampling_says(clients: range | list[int]) -> None:
    for sampling in (*SAMPLINGS, Sampling()):
        fewest, most = sampling.sizes(clients)
        found = {len(sampling.cohort(clients, number, 7)) for number in range(1, 60)}
        assert fewest <= min(found) <= max(found) <= most <= len(clients)
        if fewest == most:
            assert found == {most}
    assert MinimumSeparation(4).sizes(range(10)) == (2, 3) and EveryClient().sizes([4, 7]) == (2, 2)


def test_minimum_separation_looks_at_its_cohort_alone() -> None:
    assert len(MinimumSeparation(10**8).cohort(range(10**9), 1, 0)) == 10


def test_impossible_samplings_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"size must be >= 1, got 0"):
        FixedSampling(0)
    with pytest.raises(ConfigError, match=r"rate must be > 0 and <= 1, got 1.5"):
        PoissonSampling(1.5)
    with pytest.raises(ConfigError, match=r"rounds_apart must be >= 1, got 0"):
        MinimumSeparation(0)
    with pytest.raises(ConfigError, match="a cohort of 5 was asked for and there are 3 clients"):
        FixedSampling(5).require(3)


def test_a_sampling_travels_as_a_name_and_numbers() -> None:
    for sampling in SAMPLINGS:
        assert Sampling.from_config(sampling.to_config()) == sampling
    with pytest.raises(ConfigError, match="did you mean 'FixedSampling'"):
        Sampling.from_config({"name": "FixSampling", "size": 3})
    with pytest.raises(ConfigError, match="FixedSampling needs size"):
        Sampling.from_config("fixed-sampling")
