"""Tail probabilities, against values of SciPy 1.16 and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedml_core.privacy.tails import (
    binomial,
    chi_square_tail,
    kolmogorov_tail,
    largest_rate,
    normal_quantile,
    normal_tail,
    same_distribution,
)
from fedml_core.randomness import seeded


def test_tails_are_those_of_the_textbooks() -> None:
    # "agree with their textbook definitions to 10^-9 of a probability, or 10^-6 of a tail below it."
    # "nobody is trusted here; these are functions of public numbers."
    assert chi_square_tail(30.0, 10.0) == pytest.approx(0.0008566412, abs=1e-9)
    assert chi_square_tail(2.0, 2.0) == pytest.approx(math.exp(-1), rel=1e-12)
    assert kolmogorov_tail(1.0) == pytest.approx(0.2699996717, abs=1e-9)
    assert kolmogorov_tail(0.1) == 1.0
    assert normal_tail(1.6448536269514722) == pytest.approx(0.05, rel=1e-9)
    assert normal_quantile(0.975) == pytest.approx(1.959963984540054, rel=1e-9)
    assert binomial(4, 0.5).tolist() == pytest.approx([1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16])
    assert binomial(1000, 0.3).sum() == pytest.approx(1.0, abs=1e-9)
    assert binomial(3, 1.0).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_the_upper_end_of_a_rate_solves_its_own_equation() -> None:
    found = largest_rate(7, 50, 0.05)
    assert binomial(50, found)[:8].sum() == pytest.approx(0.05, rel=1e-6)
    assert largest_rate(5, 5, 0.05) == 1.0


def test_two_samples_of_one_distribution_agree_and_of_two_do_not() -> None:
    first, second = seeded("ks", 1).standard_normal(5000), seeded("ks", 2).standard_normal(5000)
    assert same_distribution(first, second) > 1e-3
    assert same_distribution(first, second * 1.2) < 1e-3
    assert same_distribution(first, np.sign(second)) < 1e-9
