"""Numbers that differ from client to client: what they promise of a population, and of one client."""

from __future__ import annotations

import numpy as np
import pytest

from fedml_core.errors import ConfigError
from simulations import Constant, LogNormal, Spread, Tiers

MANY = np.arange(20_000)
SPREADS = [Constant(3.0), LogNormal(10.0, 0.5), Tiers((1.0, 5.0, 9.0), (0.2, 0.3, 0.5))]


@pytest.mark.parametrize("spread", SPREADS, ids=lambda spread: type(spread).__name__)
def test_a_clients_number_depends_on_seed_purpose_and_client_alone(spread: Spread) -> None:
    whole = spread.draw(7, "speed", MANY)
    assert np.array_equal(spread.draw(7, "speed", [19_999, 3, 500]), whole[[19_999, 3, 500]])
    assert (whole >= spread.least()).all()
    assert spread.draw(7, "speed", []).shape == (0,)


def test_a_constant_is_the_same_for_all() -> None:
    assert set(Constant(3).draw(0, "speed", MANY).tolist()) == {3.0}


def test_a_log_normal_has_its_median_and_its_sigma() -> None:
    logarithms = np.log(LogNormal(10.0, 0.5).draw(1, "speed", MANY))
    # Of 20,000 normal draws: within 4 standard errors of the mean and of the standard deviation.
    assert abs(logarithms.mean() - np.log(10.0)) < 4 * 0.5 / 20_000**0.5
    assert abs(logarithms.std() - 0.5) < 4 * 0.5 / 40_000**0.5
    # Normal in its shape too: a share of 0.0228 lies above two standard deviations, within 4 standard errors.
    assert abs((logarithms > np.log(10.0) + 1.0).mean() - 0.02275) < 4 * (0.0228 / 20_000) ** 0.5


def test_two_purposes_of_a_log_normal_are_independent() -> None:
    one, other = (LogNormal(1.0).draw(1, purpose, MANY) for purpose in ("up", "down"))
    assert abs(np.corrcoef(np.log(one), np.log(other))[0, 1]) < 4 / 20_000**0.5


def test_tiers_have_their_shares() -> None:
    drawn = Tiers((1.0, 5.0, 9.0), (0.2, 0.3, 0.5)).draw(1, "speed", MANY)
    for value, share in ((1.0, 0.2), (5.0, 0.3), (9.0, 0.5)):
        assert abs((drawn == value).mean() - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    equal = Tiers((1.0, 2.0)).draw(1, "speed", MANY)
    assert abs((equal == 1.0).mean() - 0.5) < 4 * 0.5 / 20_000**0.5


def test_who_is_in_a_slow_tier_is_so_for_every_purpose() -> None:
    speed = Tiers((1.0, 9.0), (0.3, 0.7)).draw(1, "speed", MANY)
    upload = Tiers((10.0, 90.0), (0.3, 0.7)).draw(1, "upload", MANY)
    assert np.array_equal(speed * 10, upload)
    assert not np.array_equal(speed, Tiers((1.0, 9.0), (0.3, 0.7)).draw(2, "speed", MANY))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Constant(float("nan")), "value must be finite, got nan"),
        (lambda: LogNormal(0.0), "median must be > 0, got 0.0"),
        (lambda: LogNormal(1.0, -1.0), "sigma must be >= 0 and <= 20, got -1.0"),
        (lambda: Tiers(()), "values must be a list of numbers with at least one in it, got ()"),
        (lambda: Tiers("12"), "values must be a list of numbers"),  # type: ignore[arg-type]
        (lambda: Tiers((1.0, True)), r"values[1] must be a number, got True"),
        (lambda: Tiers((1.0,), (0.5, 0.5)), "there are 1 values and 2 shares; give one for each"),
        (lambda: Tiers((1.0, 2.0), (0.5, 0.4)), "shares must add up to 1, got 0.9"),
        (lambda: Tiers((1.0, 2.0), (1.5, -0.5)), r"shares[0] must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()  # type: ignore[operator]
    assert said in str(caught.value)
