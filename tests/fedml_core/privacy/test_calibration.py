from __future__ import annotations

from typing import Any

import pytest

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.analytic import analytic_gaussian_sigma
from fedml_core.privacy.calibration import noise_for
from tests.fedml_core.privacy.accounting_cases import (
    fixed_size,
    gaussian,
    integer_sum,
    laplace,
    poisson,
    repeated,
    tree,
)

# Trust: the events that are made for a noise multiplier are those that will happen with it.
CLIENT = {"unit": "client", "adjacency": "add-or-remove-one"}
CASES = [
    (lambda z: [repeated(100, gaussian(z))], 0.5, "add-or-remove-one"),
    (lambda z: [repeated(1000, poisson(0.1, gaussian(z)))], 4.0, "add-or-remove-one"),
    (lambda z: [repeated(100, poisson(0.01, gaussian(z)))], 8.0, "replace-one"),
    (lambda z: [repeated(50, fixed_size(20, 1000, gaussian(z)))], 2.0, "replace-one"),
    (lambda z: [tree(z, 100, restarts=4)], 8.0, "replace-special"),
    (lambda z: [laplace(z), gaussian(3.0)], 3.0, "add-or-remove-one"),
    (lambda z: [integer_sum("discrete-gaussian-sum", local_noise=z)], 1.0, "add-or-remove-one"),
]


# with the returned noise the events cost at most the target; with 0.02 % less they would cost more.
@pytest.mark.parametrize(("make", "target", "adjacency"), CASES)
def test_the_noise_is_the_least_that_keeps_the_promise(make: Any, target: float, adjacency: str) -> None:
    found = noise_for(target, 1e-5, make, unit="client", adjacency=adjacency)

    def cost(noise: float) -> float:
        return epsilon_of(make(noise), delta=1e-5, unit="client", adjacency=adjacency).epsilon

    assert cost(found) <= target < cost(found * (1 - 2e-4))


def test_one_gaussian_release_is_calibrated_to_the_closed_form() -> None:
    for target in (0.1, 1.0, 10.0):
        found = noise_for(target, 1e-6, lambda z: [gaussian(z)], **CLIENT)
        exact = analytic_gaussian_sigma(target, 1e-6)
        assert exact * (1 - 1e-8) <= found <= exact * (1 + 1.01e-4)


def test_a_target_that_no_noise_reaches_is_refused_with_what_stands_in_the_way() -> None:
    with pytest.raises(
        PrivacyError, match=r"what the noise does not touch costs 4\.377 alone; release that less often"
    ):
        noise_for(2.0, 1e-5, lambda z: [gaussian(z), gaussian(1.0)], **CLIENT)


def test_a_target_that_needs_no_noise_is_refused() -> None:
    with pytest.raises(PrivacyError, match="asks for no protection: a noise multiplier of 0.001 already gives"):
        noise_for(1e9, 1e-5, lambda z: [gaussian(z)], **CLIENT)


@pytest.mark.parametrize(("target", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (float("nan"), 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_a_target_or_delta_out_of_range_is_refused(target: float, delta: float) -> None:
    with pytest.raises(ConfigError, match="must be > 0"):
        noise_for(target, delta, lambda z: [gaussian(z)], **CLIENT)


def test_events_that_nothing_accounts_for_are_refused_before_any_search() -> None:
    with pytest.raises(PrivacyError, match="nothing can account for"):
        noise_for(1.0, 1e-5, lambda z: [{"name": "hope", "noise_multiplier": z}], **CLIENT)
