"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
import pytest

from fedml_core.errors import ConfigError
from server.sampling import EveryClient, FixedSampling, PoissonSampling, Sampling

SAMPLINGS = [EveryClient(), FixedSampling(5), PoissonSampling(0.3)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_cohort_depends_on_seed_and_round_alone(sampling: Sampling) -> None:
    clients = range(50)
    assert sampling.cohort(clients, 3, 7) == sampling.cohort(clients, 3, 7)
    if sampling != EveryClient():
        assert sampling.cohort(clients, 3, 7) != sampling.cohort(clients, 4, 7)
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


def test_impossible_samplings_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"size must be >= 1, got 0"):
        FixedSampling(0)
    with pytest.raises(ConfigError, match=r"rate must be > 0 and <= 1, got 1.5"):
        PoissonSampling(1.5)
    with pytest.raises(ConfigError, match="a cohort of 5 was asked for and there are 3 clients"):
        FixedSampling(5).require(3)


def test_a_sampling_travels_as_a_name_and_numbers() -> None:
    for sampling in SAMPLINGS:
        assert Sampling.from_config(sampling.to_config()) == sampling
    with pytest.raises(ConfigError, match="did you mean 'FixedSampling'"):
        Sampling.from_config({"name": "FixSampling", "size": 3})
    with pytest.raises(ConfigError, match="FixedSampling needs size"):
        Sampling.from_config("fixed-sampling")
