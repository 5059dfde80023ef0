"""A noised sum: bounded integers, noise of the configured size from fresh keys, and the books that go with it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedml_core.errors import ConfigError, PrivacyError, SecureAggregationError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.distributed import rounded_l2
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.integer_noise import GaussianIntegers, IntegerNoise, SkellamIntegers
from fedml_core.privacy.noised_encoding import NoisedEncoding, _round
from fedml_core.privacy.packing import SUM_BITS, unpack
from fedml_core.privacy.rotation import Rotation
from fedml_core.ring import encoding_from_table, encoding_to_table

NOISES = [GaussianIntegers(), SkellamIntegers()]
KEY = bytes(range(32))


def encoding(**changes: object) -> NoisedEncoding:
    fields: dict[str, object] = {
        "size": 1000, "clients": 10, "honest": 5, "clip_norm": 0.5, "noise_multiplier": 1.0, "rotation": "r"
    }  # fmt: skip
    return NoisedEncoding(**{**fields, **changes})  # type: ignore[arg-type]  # a test's own settings


def updates(count: int, size: int, norm: float, seed: int = 1) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).normal(size=(count, size))
    return np.asarray(rows * norm / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def close(measured: float, configured: float) -> bool:
    """Say whether a deviation is within 1 %: over 2^20 coordinates that is 14 standard errors."""
    return abs(measured / configured - 1) < 0.01


def test_the_grid_and_the_noise_are_those_of_the_reference() -> None:
    planned = NoisedEncoding(65_536, 100, 100, 1.0, 1.0)
    assert 1 / planned.scale == pytest.approx(1.966e-4, rel=1e-3)
    assert planned.deviation == pytest.approx(508.7, rel=1e-4)
    # Row 16: 4.7548 by integer orders; real orders are a little better, and the Gaussian's own 4.7285 is never reached.
    for noise in NOISES:
        event = dataclasses.replace(planned, noise=noise).event()
        claim = epsilon_of([event], delta=1e-5, unit="client", adjacency="replace-special")
        assert 4.7285 < claim.epsilon <= 4.7549


@pytest.mark.parametrize("bits", SUM_BITS)
@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_the_event_describes_what_is_drawn(bits: int, noise: IntegerNoise) -> None:
    # "`event` describes exactly what `encode_rows` does with these fields."
    # "a noise and the event that is reported for it have the same distribution."
    if bits == 32 and noise == SkellamIntegers():
        with pytest.raises(ConfigError, match="use fewer bits, or GaussianIntegers"):
            encoding(sum_bits=bits, noise=noise)
        return
    planned = encoding(size=200_000, sum_bits=bits, noise=noise)
    event = planned.event()
    assert (
        event["name"]
        == {"GaussianIntegers": "discrete-gaussian-sum", "SkellamIntegers": "skellam-sum"}[type(noise).__name__]
    )
    assert (event["clients"], event["dimension"], event["l2"], event["ring_bits"]) == (5, 229_376, 0.5, bits)
    drawn = planned.integers(np.zeros(200_000, dtype=np.float32)) / event["scale"]
    # 229,376 coordinates: the standard error of the deviation is 0.15 %.
    assert abs(float(drawn.std()) / event["local_noise"] - 1) < 0.01
    assert not abs(float(drawn.std()) / (event["local_noise"] * 1.02) - 1) < 0.01
    assert abs(float(drawn.mean())) < 5 * event["local_noise"] / math.sqrt(229_376)


def test_the_honest_clients_noise_adds_up_to_the_multiplier_whoever_drops_out() -> None:
    # "the honest clients' noise together has a standard deviation of at least noise_multiplier x clip_norm."
    # "server sees only noised sums, as long as `honest` of the clients in each add their noise and keep it secret."
    size = 1 << 20
    planned = encoding(size=size)
    rows = updates(10, size, 0.4)
    sent = [planned.encode_rows(row[None])[0] for row in rows]
    for left in (10, 9, 7, 5):
        total = np.sum(sent[:left], axis=0, dtype="<u2")
        decoded = planned.decode(total, left)
        residual = decoded.values - rows[:left].sum(axis=0, dtype=np.float64)
        configured = planned.local_noise * math.sqrt(left)
        assert close(float(residual.std()), configured)
        assert not close(float(residual.std()), configured * 0.98)
        assert float(residual.std()) > 1.0 * 0.5 * 0.997  # z x c; 0.3 % are four standard errors
        assert decoded.noise == pytest.approx(0.5) and decoded.count == left and not decoded.scalars


def test_nothing_wraps_in_16_bits_in_a_hundred_rounds_of_aligned_updates() -> None:
    size, clients = 1 << 16, 6
    aligned = updates(1, size, 0.5)[0]
    for round_number in range(100):
        planned = encoding(size=size, clients=clients, rotation=str(round_number))
        stream = NoiseStream.fresh()
        wide = clients * planned.rounded(aligned, stream)
        for _ in range(clients):
            wide += planned.noise.sampler(planned.deviation).draw(stream, size)
        assert wide.min() >= -(2**15) and wide.max() < 2**15
    assert np.array_equal(unpack(wide.astype("<u2"), size, 16), wide)
    assert np.abs(wide).max() > 2**15 * 0.6  # the room is used: 4.9 of 6 deviations are usual among 65,536


@pytest.mark.parametrize("bits", SUM_BITS)
@pytest.mark.parametrize("kind", ["short", "at the clip", "long", "huge", "tiny", "zero", "one coordinate", "float64"])
def test_integers_are_never_longer_than_the_accounting_assumes(bits: int, kind: str) -> None:
    # "the integers that noise is added to have at most the L2 norm that the event's accounting assumes."
    rows: dict[str, NDArray[Any]] = {
        "short": updates(1, 1000, 0.1)[0],
        "at the clip": np.full(1000, 0.5 / math.sqrt(1000), dtype=np.float32),
        "long": updates(1, 1000, 50.0)[0],
        "huge": np.full(1000, 3e38, dtype=np.float32),
        "tiny": np.full(1000, 1e-45, dtype=np.float32),
        "zero": np.zeros(1000, dtype=np.float32),
        "one coordinate": np.eye(1, 1000, dtype=np.float32)[0],
        "float64": updates(1, 1000, 50.0)[0].astype(np.float64),
    }
    planned = encoding(sum_bits=bits)
    event = planned.event()
    longest = rounded_l2(event["l2"], event["scale"], event["dimension"], event["beta"])
    for _ in range(20):
        whole = planned.rounded(rows[kind], NoiseStream.fresh())
        assert sum(int(one) ** 2 for one in whole) <= longest**2
    if kind not in ("short", "tiny", "zero"):
        assert np.linalg.norm(whole / planned.scale) > 0.5 * 0.999


def test_a_rounding_that_came_out_too_long_is_drawn_again() -> None:
    # Steps so large that each coordinate of an update has two or three: one in ten roundings is too long.
    coarse = encoding(size=32, clients=2000, honest=2000, noise_multiplier=200.0)
    event = coarse.event()
    longest = rounded_l2(event["l2"], event["scale"], event["dimension"], event["beta"])
    even = np.full(32, 0.5 * (1 - 1e-6) / math.sqrt(32))
    worst, out = Rotation(32, "r").back(even), np.empty(32, dtype=np.int64)
    once = [_round(even, event["scale"], NoiseStream.fresh(), out) > longest**2 for _ in range(400)]
    assert 10 < sum(once) < 100
    assert all(np.linalg.norm(coarse.rounded(worst, NoiseStream.fresh())) <= longest for _ in range(400))


def test_rounding_is_right_in_the_mean() -> None:
    planned, row = encoding(size=16, clip_norm=1.0), updates(1, 16, 0.7)[0]
    rounded = np.mean([planned.rounded(row, NoiseStream.fresh()) for _ in range(4000)], axis=0)
    expected = Rotation(16, "r").forward(planned.scale * row.astype(np.float64))
    assert np.abs(expected - np.rint(expected)).max() > 0.2  # there is something to round
    # The mean of 4,000 coins has a deviation of at most 0.008.
    np.testing.assert_allclose(rounded, expected, atol=0.04)


def test_noise_and_rounding_are_fresh_in_every_row_and_take_no_seed() -> None:
    # "the noise of each row comes from a fresh key of the operating system; no argument decides it."
    planned, row = encoding(size=100_000), updates(1, 100_000, 0.4)
    twice = planned.encode_rows(np.concatenate([row, row]))
    one, other = (unpack(words, planned.dimension, 16) for words in twice)
    assert close(float((one - other).std()), math.sqrt(2) * planned.deviation)
    assert abs(float(np.corrcoef(one, other)[0, 1])) < 0.05
    names = {*inspect.signature(NoisedEncoding).parameters, *inspect.signature(planned.encode_rows).parameters}
    assert not any(word in name for name in names for word in ("seed", "key", "stream", "draws"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_finite_or_weighs_more_raises(bad: float, dtype: type) -> None:
    # "an update that holds NaN or infinity, or has another weight than 1, raises, and nothing is returned."
    planned = encoding()
    rows: NDArray[Any] = updates(2, 1000, 0.1).astype(dtype)
    with pytest.raises(SecureAggregationError, match="weight other than 1 was not sent"):
        planned.encode_rows(rows, [1.0, 2.0])
    rows[1, 500] = bad
    with pytest.raises(SecureAggregationError, match="NaN or infinite values; nothing was sent"):
        planned.encode_rows(rows, [1.0, 1.0])


def test_an_update_of_another_shape_or_kind_is_refused() -> None:
    for rows in (np.zeros((1, 999), np.float32), np.zeros(1000, np.float32), np.zeros((1, 1000), np.int64)):
        with pytest.raises(SecureAggregationError, match="updates must be float32 or float64 of shape"):
            encoding().encode_rows(rows)


def test_a_sum_of_too_few_too_many_or_something_else_is_not_decoded() -> None:
    planned = encoding()
    total = planned.encode_rows(updates(1, 1000, 0.1))[0]
    for count in (0, 4, 11):
        with pytest.raises(SecureAggregationError, match=f"of 5 to 10 vectors, got {count}"):
            planned.decode(total, count)
    for wrong in (total[:-1], total.astype("<u4"), total[None]):
        with pytest.raises(SecureAggregationError, match="a sum must be uint16 of shape"):
            planned.decode(wrong, 5)


def test_a_session_that_could_reveal_too_little_noise_is_not_admitted() -> None:
    planned = encoding()
    planned.admit(10, 6, 1)
    with pytest.raises(PrivacyError, match="5 clients of whom 1 may collude has the noise of 4 honest ones, and 5"):
        planned.admit(10, 5, 1)
    with pytest.raises(PrivacyError, match="11 clients are in a sum that has room for 10"):
        planned.admit(11, 10, 0)


@pytest.mark.parametrize("noise", NOISES, ids=repr)
def test_an_encoding_survives_the_table_that_members_are_sent(noise: IntegerNoise) -> None:
    # "all fields are public."
    planned = encoding(noise=noise, sum_bits=20)
    assert encoding_from_table(encoding_to_table(planned), 64) == planned


@pytest.mark.parametrize(
    ("change", "bits"),
    [
        ({"noise": {"name": "NoNoise"}}, 16),
        ({"noise": None}, 16),
        ({"noise_multiplier": 0.0}, 16),
        ({"noise_multiplier": float("nan")}, 16),
        ({"honest": 11}, 16),
        ({"size": 10**30}, 16),
        ({"size": "many"}, 16),
        ({"rotation": 5}, 16),
        ({"more": 1}, 16),
        ({}, 32),
    ],
)
def test_a_table_that_is_no_encoding_is_refused_in_one_line(change: dict[str, object], bits: int) -> None:
    with pytest.raises(SecureAggregationError, match="encoding"):
        encoding_from_table({**encoding_to_table(encoding()), **change}, bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"honest": 0}, "honest must be >= 1"),
        ({"honest": 11}, "honest must be >= 1 and <= 10, got 11"),
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
        ({"sum_bits": 24}, "bits must be 16, 20 or 32, got 24"),
        ({"clients": 50_000, "honest": 50_000}, "use more bits, or smaller cohorts"),
        ({"clients": 1 << 24, "honest": 1}, "use more bits, or smaller cohorts"),
        ({"size": 0}, "size must be >= 1"),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoding(**changes)


def test_the_noise_protects_those_who_keep_their_key() -> None:
    # "the noise protects from whoever does not know the stream's key."
    sampler = GaussianIntegers().sampler(50.0)
    hidden, known = sampler.draw(NoiseStream.fresh(), 1000), sampler.draw(NoiseStream(KEY), 1000)
    assert not np.array_equal(hidden, known)
    assert np.array_equal(known, sampler.draw(NoiseStream(KEY), 1000))  # who knows the key takes the noise off


def test_the_base_of_noises_draws_none() -> None:
    with pytest.raises(ConfigError, match="IntegerNoise must define sampler"):
        IntegerNoise().sampler(1.0)
