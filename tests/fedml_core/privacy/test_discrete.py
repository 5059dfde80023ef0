"""The samplers of integer noise against exact probabilities, which SciPy and plain sums compute independently."""

from __future__ import annotations

import ast
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy import discrete, tables
from fedml_core.privacy.discrete import DiscreteGaussian, Skellam
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.tables import AliasTable, symmetric_weights
from tests.fedml_core.privacy.given_words import Given

Integers = NDArray[np.int64]
COUNT = 400_000


def gaussian_pmf(sigma: float, values: Integers) -> NDArray[np.float64]:
    around = np.arange(-int(40 * sigma) - 40, int(40 * sigma) + 41)
    total = float(np.exp(-(around**2) / (2 * sigma**2)).sum())
    return np.asarray(np.exp(-(values**2) / (2 * sigma**2)) / total)


def skellam_pmf(variance: float, values: Integers) -> NDArray[np.float64]:
    return np.asarray(special.ive(np.abs(values), variance))


def fit(drawn: Integers, values: Integers, pmf: NDArray[np.float64]) -> float:
    """Return the p-value of the chi-square test, with cells of about 2,000 expected draws."""
    expected, seen = pmf * len(drawn), np.bincount(drawn - values[0], minlength=len(values)).astype(float)
    cells = np.minimum(np.cumsum(expected) // 2000, len(drawn) // 2000 - 1).astype(int)
    _, cells = np.unique(cells, return_inverse=True)
    wanted, found = np.bincount(cells, expected), np.bincount(cells, seen)
    return float(stats.chisquare(found, wanted * found.sum() / wanted.sum()).pvalue)


SAMPLERS = [
    (DiscreteGaussian(0.4), 0.4, gaussian_pmf),
    (DiscreteGaussian(1.5), 1.5, gaussian_pmf),
    (DiscreteGaussian(508.7), 508.7, gaussian_pmf),
    (Skellam(0.3), 0.3, skellam_pmf),
    (Skellam(5.0), 5.0, skellam_pmf),
    (Skellam(508.7**2), 508.7**2, skellam_pmf),
]


@pytest.mark.parametrize(("sampler", "number", "pmf"), SAMPLERS, ids=[repr(row[0]) for row in SAMPLERS])
def test_draws_follow_the_exact_probabilities_and_a_wrong_scale_is_noticed(
    sampler: DiscreteGaussian | Skellam, number: float, pmf: object
) -> None:
    assert callable(pmf)
    deviation = math.sqrt(number) if isinstance(sampler, Skellam) else number
    values = np.arange(-int(20 * deviation) - 20, int(20 * deviation) + 21)
    drawn = sampler.draw(NoiseStream(bytes(32)), COUNT)
    assert fit(drawn, values, pmf(number, values)) > 1e-4
    # 3 % in the scale: the test would take the wrong sampler for the right one with a probability below 10^-4.
    assert fit(drawn, values, pmf(number * 1.03, values)) < 1e-4


@pytest.mark.parametrize("sigma", [5000.0, 1e6, 4e7, 2.0**40])
def test_wide_gaussians_have_the_shape_and_the_fine_structure(sigma: float) -> None:
    drawn = DiscreteGaussian(sigma).draw(NoiseStream(b"w" * 32), COUNT)
    assert stats.kstest(drawn / sigma, "norm").pvalue > 1e-4
    assert stats.kstest(drawn / (1.02 * sigma), "norm").pvalue < 1e-4
    # The coarse part's grid must not show: every remainder is as frequent as any other.
    assert stats.chisquare(np.bincount(drawn & 255, minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("number", [0.7, 12.0, 600.0])
def test_a_table_adds_up_to_two_to_the_128_and_holds_exactly_the_named_weights(number: float) -> None:
    # "the weights of a table add up to 2^128, and each value is drawn with its weight / 2^128, exactly."
    weights = symmetric_weights(discrete._gaussian_relative(number))
    table = AliasTable(-(len(weights) // 2), weights)
    held: Counter[int] = Counter()
    for value, weight in table.weights():
        assert weight >= 0
        held[value] += weight
    assert sum(weights) == sum(held.values()) == 1 << 128
    assert +held == Counter({place - len(weights) // 2: weight for place, weight in enumerate(weights)})


@pytest.mark.parametrize(
    ("relative", "pmf"),
    [
        (discrete._gaussian_relative(3.0), lambda k: math.exp(-(k**2) / 18)),
        (discrete._skellam_relative(9.0), lambda k: float(special.iv(k, 9.0))),
    ],
    ids=["gaussian", "skellam"],
)
def test_probabilities_are_right_far_into_the_tail(relative: list[int], pmf: object) -> None:
    assert callable(pmf)
    weights = symmetric_weights(relative)
    zero = len(weights) // 2
    total = pmf(0) + 2 * sum(pmf(k) for k in range(1, 200))
    for k in range(zero + 1):
        # A weight is a whole number: near 2^-128 its rounding shows.
        assert weights[zero + k] / 2.0**128 == pytest.approx(pmf(k) / total, rel=1e-12, abs=2.0**-127)
        assert weights[zero + k] == weights[zero - k] > 0
    assert pmf(zero + 1) / total < 2.0**-127  # nothing that has a weight is missing
    # "each is at most 2^-128 from its share, except that of 0, which takes what rounding left over."
    share = Fraction(relative[1], relative[0] + 2 * sum(relative[1:]))
    assert 0 <= share - Fraction(weights[zero + 1], 1 << 128) < Fraction(1, 1 << 128)


def test_rounding_and_smoothing_together_are_as_small_as_promised() -> None:
    # "the distribution that is drawn is at most 2^-107 from the one that is named, in total variation."
    widest = [discrete._gaussian_relative(discrete._WIDEST_TABLE), discrete._skellam_relative(2.0**30)]
    entries = max(len(symmetric_weights(relative)) for relative in widest)
    assert entries / 2.0**128 < 2.0**-108
    fine, coarse = discrete._FINE_SIGMA, discrete._WIDEST_TABLE
    together = fine**2 * (coarse**2 - fine**2) / coarse**2
    smoothing = 2 * math.exp(-2 * math.pi**2 * together / (1 << discrete._FINE_BITS) ** 2)
    assert 6 * smoothing < 2.0**-128  # at most six levels


def test_no_value_without_a_weight_is_drawn() -> None:
    # "no value without a weight is ever drawn."
    weights = [1 << 127, 0, 0, 1 << 126, 0, 1 << 126]
    drawn = np.empty(100_000, dtype=np.int64)
    AliasTable(10, weights).draw_into(NoiseStream(b"n" * 32), drawn)
    assert sorted(set(drawn.tolist())) == [10, 13, 15]
    assert abs(np.mean(drawn == 10) - 0.5) < 0.007  # more than four standard deviations


def test_a_tie_of_first_words_is_settled_by_the_second() -> None:
    # Value 0 has 2^126 + 5 of 2^128: in its slot of 2^127 the cut's first word is 2^62, its second word 5.
    table = AliasTable(0, [(1 << 126) + 5, (1 << 128) - (1 << 126) - 5])
    for second, expected in ((4, 0), (5, 1), (6, 1)):
        drawn = np.empty(1, dtype=np.int64)
        table.draw_into(Given([1 << 62, second]), drawn)
        assert drawn.tolist() == [expected]
    below, beyond = np.empty(1, dtype=np.int64), np.empty(1, dtype=np.int64)
    table.draw_into(Given([(1 << 62) - 1]), below)
    table.draw_into(Given([(1 << 62) + 1]), beyond)
    assert (below.tolist(), beyond.tolist()) == ([0], [1])


@pytest.mark.parametrize("weights", [[1, 2], [1 << 128, 1], [-1, (1 << 128) + 1]])
def test_weights_that_do_not_add_up_are_refused(weights: list[int]) -> None:
    with pytest.raises(PrivacyError, match="add up to 2\\^128"):
        AliasTable(0, weights)


def test_a_draw_is_whole_numbers_from_the_stream_alone() -> None:
    # "a draw uses no floating-point number."
    # "weights are public; what is drawn is as secret as the stream's key."
    # "the noise protects from whoever does not know the stream's key."
    text = Path(tables.__file__).read_text(encoding="utf-8")
    used = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    assert not used & {"float64", "float32", "log", "exp", "random"}
    for sampler in (DiscreteGaussian(30.0), DiscreteGaussian(1e6), Skellam(30.0)):
        same = [sampler.draw(NoiseStream(b"k" * 32), 5000) for _ in range(2)]
        assert same[0].tolist() == same[1].tolist() and same[0].dtype == np.int64
        assert sampler.draw(NoiseStream.fresh(), 5000).tolist() != same[0].tolist()
        assert len(sampler.draw(NoiseStream.fresh(), 0)) == 0


def test_one_draw_at_a_time_and_many_are_distributed_alike() -> None:
    stream, sampler = NoiseStream(b"s" * 32), DiscreteGaussian(2.0)
    singly = np.concatenate([sampler.draw(stream, 1) for _ in range(3000)])
    assert abs(singly.std() - 2.0) < 0.13  # five standard deviations


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-3, 2.0**49])
def test_a_gaussian_that_cannot_be_drawn_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma must be"):
        DiscreteGaussian(sigma)


@pytest.mark.parametrize("variance", [0.0, math.nan, 1e-5, 2.0**31])
def test_a_skellam_that_cannot_be_drawn_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="variance must be"):
        Skellam(variance)
