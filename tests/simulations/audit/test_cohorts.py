"""Cohorts against the scheme that is claimed; every draw is keyed, so every p-value reproduces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedml_core.randomness import seeded
from server.sampling import EveryClient, FixedSampling, PoissonSampling, Sampling
from simulations.audit.cohorts import check_sampling, rate_of
from simulations.audit.findings import Verdict
from tests.simulations.audit.audit_cases import shuffled


@dataclass(frozen=True)
class _Favourites(FixedSampling):
    """Asks the first clients more often."""

    def hidden_cohort(self, clients: Sequence[int], round_number: int, secret: bytes) -> list[int]:
        weights = 1.0 / (10 + seeded("order").permutation(len(clients)))
        draws = seeded(secret.hex(), "favourites", round_number)
        return sorted(draws.choice(len(clients), self.size, replace=False, p=weights / weights.sum()).tolist())


@dataclass(frozen=True)
class _Twice(FixedSampling):
    """Asks one client twice."""

    def hidden_cohort(self, clients: Sequence[int], round_number: int, secret: bytes) -> list[int]:
        return [*super().hidden_cohort(clients, round_number, secret)[1:], 0, 0][-self.size :]


def verdict(sampling: Sampling, observed: Sequence[int] = ()) -> tuple[Verdict, str]:
    found, _ = check_sampling(sampling, 200, observed, seed=4)
    return found.verdict, found.said


def test_samplings_that_do_as_they_say_pass() -> None:
    assert verdict(PoissonSampling(0.1))[0] is Verdict.PASS
    assert verdict(FixedSampling(20), [20] * 12)[0] is Verdict.PASS
    assert verdict(EveryClient())[0] is Verdict.INFO


def test_shuffling_claimed_as_poisson_fails() -> None:
    found, said = verdict(shuffled(0.1))
    assert found is Verdict.FAIL
    assert "Poisson sampling is claimed" in said


def test_a_run_whose_cohorts_all_have_one_size_fails_a_poisson_claim() -> None:
    assert verdict(PoissonSampling(0.1), [20] * 60)[0] is Verdict.FAIL


def test_favourites_and_clients_that_are_asked_twice_fail() -> None:
    assert "come more often" in verdict(_Favourites(20))[1]
    assert "holds a client twice" in verdict(_Twice(20))[1]
    assert "one has 19" in verdict(FixedSampling(20), [20, 19])[1]


def test_the_rate_is_that_of_the_event() -> None:
    assert rate_of(PoissonSampling(0.25), 8) == 0.25
    assert rate_of(FixedSampling(2), 8) == 0.25
    assert rate_of(EveryClient(), 8) == 1.0
