"""Adaptive clipping: it goes to the quantile from anywhere, and its counter is paid for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml_core.accumulate import PlainSum
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.adaptive_clip import AdaptiveClip, ClipByQuantile, noise_beside_counter
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.transform import Draws, State, Transform, chain
from fedml_core.update import Update

CLIENTS, SIZE = 500, 20
SPEC = ModelSpec.of_size(SIZE)


def cohort() -> torch.Tensor:
    """Return updates in random directions, with norms of a lognormal distribution around 1."""
    draws = np.random.Generator(np.random.Philox(key=7))
    rows = draws.standard_normal((CLIENTS, SIZE))
    rows *= (np.exp(0.7 * draws.standard_normal(CLIENTS)) / np.linalg.norm(rows, axis=1))[:, None]
    return torch.from_numpy(rows).float()


def a_round(pipeline: Transform, state: State, rows: torch.Tensor) -> State:
    update = Update(rows, torch.ones(len(rows), dtype=torch.float64))
    encoded, _ = pipeline.encode(update, pipeline.told(state), {}, Draws.of(0))
    accumulator = PlainSum(pipeline.encoded_size(SIZE))
    accumulator.add(encoded)
    return pipeline.decode(accumulator.total(), state, Draws.of(0))[1]


@pytest.mark.parametrize("quantile", [0.5, 0.8])
@pytest.mark.parametrize("initial", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_the_norm_converges_to_the_quantile_from_anywhere(initial: float, quantile: float) -> None:
    # "C shrinks where too many updates are shorter than it, and grows where too many are clipped."
    rule = AdaptiveClip(initial=initial, quantile=quantile)
    pipeline = chain(rule.transform(1.0, CLIENTS), ServerGaussian(1.0, CLIENTS))
    state, rows = pipeline.init(SPEC), cohort()
    norms = rows.double().norm(dim=1)
    shares = []
    for number in range(250):
        state = a_round(pipeline, state, rows)
        if number >= 200:
            shares.append(float((norms <= state["0"]["clip_norm"]).double().mean()))
    # The count's noise is 5 % of the cohort a round and is averaged by the learning rate: 50 rounds are off by 0.6 %.
    assert float(np.mean(shares)) == pytest.approx(quantile, abs=0.05)


@pytest.mark.parametrize(("clip_norm", "grows"), [(0.5, True), (0.9, True), (1.1, False), (2.0, False)])
def test_the_sign_is_right(clip_norm: float, grows: bool) -> None:
    # Positive feedback would let a norm above the median grow without bound, and one below it vanish.
    clip = ClipByQuantile(clip_norm, 0.5, 0.2, 0.1, 10.0)
    after = a_round(clip, clip.init(SPEC), torch.eye(SIZE)[:10])
    expected = clip_norm * math.exp(0.1 if grows else -0.1)
    assert float(after["clip_norm"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("multiplier", "cohort_size", "expected"),
    [(1.0, 100, 1.005038), (1.0, 20, 1.154701)],
)
def test_counter_and_updates_share_one_noise_multiplier(multiplier: float, cohort_size: int, expected: float) -> None:
    # "z_delta^-2 + (2 counter_noise)^-2 = noise_multiplier^-2."
    # "A bit is +-1/2, so one client moves the count by 1/2 at most."
    counter_noise = cohort_size / 20
    assert noise_beside_counter(multiplier, counter_noise) == pytest.approx(expected, abs=1e-6)
    clip = AdaptiveClip().transform(multiplier, cohort_size)
    assert isinstance(clip, ClipByQuantile)
    # One isotropic noise on update and counter: the update's part of it and the counter's part are as the paper splits.
    noise = multiplier * clip.l2_bound(math.inf)
    assert noise == pytest.approx(expected, abs=1e-6)
    assert noise / clip.counter_scale == pytest.approx(counter_noise, rel=1e-12)


def test_a_counter_that_would_cost_more_than_everything_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"counter_noise must be > 0.5 for noise_multiplier 1, got 0.5"):
        AdaptiveClip().transform(1.0, 10.0)


def test_noise_on_the_counter_is_as_configured() -> None:
    clip = ClipByQuantile(1.0, 0.5, 1.0, 0.1, 100.0)
    pipeline = chain(clip, ServerGaussian(1.0, 100.0))
    nothing = PlainSum(SIZE + 1).total()
    logs = [
        math.log(float(pipeline.decode(nothing, pipeline.init(SPEC), Draws.of(0))[1]["0"]["clip_norm"]))
        for _ in range(3000)
    ]
    sd = math.hypot(1.0, 0.05) / 0.1 / 100.0
    # A sample deviation of 3,000 draws is off by 1.3 %; 8 % rejects any wrong factor worth the name.
    assert float(np.std(logs)) == pytest.approx(sd, rel=0.08)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    clip_norm=st.floats(1e-9, 1e9),
    scale=st.floats(1e-3, 1e3),
)
def test_update_and_counter_together_keep_the_bound_whatever_the_norm(
    values: list[float], clip_norm: float, scale: float
) -> None:
    # "each encoded update's L2 norm is at most sqrt(1 + s^2 / 4), in every round, whatever C has become."
    clip = ClipByQuantile(1.0, 0.5, 0.2, scale, 10.0)
    told = {"clip_norm": torch.tensor(clip_norm, dtype=torch.float64)}
    encoded, _ = clip.encode(Update.of(torch.tensor(values, dtype=torch.float32)), told, {}, Draws.of(0))
    assert math.sqrt(math.fsum(x * x for x in encoded.values.double().tolist())) <= clip.l2_bound(math.inf)
    assert encoded.values.shape == (clip.encoded_size(len(values)),)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_no_count_either(wrong: float) -> None:
    clip = ClipByQuantile(1.0, 0.5, 0.2, 0.1, 10.0)
    rows = torch.tensor([[wrong, 0.0], [0.0, 0.0]])
    update = Update(rows, torch.ones(2, dtype=torch.float64))
    encoded, _ = clip.encode(update, clip.told(clip.init(SPEC)), {}, Draws.of(0))
    assert encoded.values[0].isnan().all()
    torch.testing.assert_close(encoded.values[1], torch.tensor([0.0, 0.0, 0.05]))


def test_the_sum_comes_back_in_parameter_units_and_clients_are_told_the_norm_alone() -> None:
    # "decode(sum(encode(u_i))) is the sum of the updates, each clipped to C, in parameter units."
    # "the server sees each client's bit where it sees each update; what C tells of clients carries noise."
    # "updates and counter together cost what noise_multiplier alone costs."
    clip = ClipByQuantile(4.0, 0.5, 0.2, 0.1, 2.0)
    state = clip.init(ModelSpec.of_size(2))
    rows = torch.tensor([[3.0, 0.0], [0.0, 8.0]])
    encoded, _ = clip.encode(Update(rows, torch.ones(2, dtype=torch.float64)), clip.told(state), {}, Draws.of(0))
    accumulator = PlainSum(3)
    accumulator.add(encoded)
    decoded, after = clip.decode(accumulator.total(), state, Draws.of(0))
    torch.testing.assert_close(decoded.values, torch.tensor([3.0, 4.0]))
    assert float(after["clip_norm"]) == pytest.approx(4.0)  # one of two was clipped, as the quantile wants
    assert clip.told(after) == {"clip_norm": after["clip_norm"]}
    assert chain(clip, ServerGaussian(0.7, 2.0)).event() == {
        "name": "composed",
        "events": [{"name": "gaussian", "noise_multiplier": 0.7}],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"initial": 0.0}, "initial must be"),
        ({"quantile": 1.0}, "quantile must be > 0 and < 1, got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"counter_noise": -1.0}, "counter_noise must be > 0, got -1.0"),
    ],
)
def test_impossible_numbers_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveClip(**wrong)
