"""Correlated noise: prefix sums carry what the mechanism says, and nobody may come back too early."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.model import ModelSpec
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.correlated import BandedNoise, Noise, ServerBanded, ServerTree, TreeNoise, root_coefficients
from fedml_core.transform import Draws, State, Transform, chain
from fedml_core.update import Total
from fedml_core.wire import from_frame, to_frame

SIZE = 40_000


def released(
    noise: Transform, rounds: int, state: State | None = None
) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Return what rounds of zeros release, the state going through a checkpoint after each."""
    out = []
    state = noise.init(ModelSpec.of_size(SIZE)) if state is None else state
    for _ in range(rounds):
        total, after = noise.decode(Total(torch.zeros(SIZE), 1.0, 1), state, Draws.of(0))
        state = from_frame(to_frame("state", after))
        out.append(total.values.double().numpy())
    return out


def test_a_prefix_carries_one_node_for_each_binary_one() -> None:
    # "the sum of t rounds of a tree carries the noise of as many nodes as t has binary ones."
    tree = ServerTree(2.0, 10.0, TreeNoise(rounds=16), bound=0.5)
    prefix = np.zeros(SIZE)
    for number, step in enumerate(released(tree, 16), start=1):
        prefix += step
        # The deviation of 40,000 draws is off by 0.35 %; one node more or less changes it by 11 % at least.
        assert prefix.std() == pytest.approx(math.sqrt(number.bit_count()), rel=0.02), number


def test_a_new_tree_adds_to_what_the_old_ones_left() -> None:
    tree = ServerTree(1.0, 10.0, TreeNoise(rounds=8, restart_every=4), bound=1.0)
    prefix, seen = np.zeros(SIZE), []
    for step in released(tree, 8):
        prefix += step
        seen.append(round(float(prefix.var())))
    assert seen == [1, 1, 2, 1, 2, 2, 3, 2]
    assert tree.event() == {"name": "tree", "noise_multiplier": 1.0, "steps": 4, "restarts": 1}
    assert ServerTree(1.0, 1.0, TreeNoise(rounds=9, restart_every=4)).event()["restarts"] == 2
    assert ServerTree(1.0, 1.0, TreeNoise(rounds=9)).event()["restarts"] == 0


@pytest.mark.parametrize(("rounds", "bands"), [(1, 1), (6, 1), (6, 6), (17, 4), (3, 5)])
def test_what_is_left_of_banded_noise_is_that_of_the_inverted_matrix(rounds: int, bands: int) -> None:
    size = max(rounds, bands)
    matrix = sum(np.diag(np.full(size - i, c), -i) for i, c in enumerate(root_coefficients(bands)))
    exact = np.square(np.linalg.inv(matrix)[:rounds].sum(axis=0)).sum()
    assert BandedNoise(rounds=size, bands=bands).left_after(rounds) == pytest.approx(float(exact), rel=1e-12)


def test_what_is_left_of_trees_is_their_standing_nodes_and_other_noise_does_not_say() -> None:
    assert [TreeNoise(rounds=8, restart_every=4).left_after(n) for n in range(1, 9)] == [1, 1, 2, 1, 2, 2, 3, 2]
    assert Noise(rounds=3).left_after(2) is None


def test_a_client_that_takes_part_once_touches_as_many_nodes_as_the_accountant_counts() -> None:
    # "a client that takes part once in a tree is in at most floor(log2(restart_every)) + 1 of its nodes."
    for rounds in (1, 5, 8, 16, 31):
        most = 0
        for leaf in range(1, rounds + 1):
            # Node (t, l) is made in round t = k 2^l with l the trailing zeros of t, and covers the 2^l rounds up to t.
            nodes = [t for t in range(leaf, rounds + 1) if t - (t & -t) < leaf]
            most = max(most, len(nodes))
        assert most <= math.floor(math.log2(rounds)) + 1


def test_a_round_that_is_run_again_draws_other_noise_and_state_keeps_keys_alone() -> None:
    # "the state holds keys or noise of rounds that are past, so whoever reads a checkpoint can take noise off."
    tree = ServerTree(1.0, 10.0, TreeNoise(rounds=8), bound=1.0)
    total, state = Total(torch.zeros(SIZE), 1.0, 1), tree.init(ModelSpec.of_size(SIZE))
    for _ in range(3):
        _, state = tree.decode(total, state, Draws.of(0))
    first, again = (tree.decode(total, state, Draws.of(0))[0].values for _ in range(2))
    assert not torch.equal(first, again)
    assert {key.numel() for key in state["keys"].values()} == {32}
    assert tree.told(state) == {}


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_the_factor_times_the_noise_is_independent(bands: int) -> None:
    # "the matrix of c times the noise of all rounds is independent, of standard deviation
    # noise_multiplier x bound."
    noise = ServerBanded(2.0, 10.0, BandedNoise(rounds=6, bands=bands), bound=0.5)
    rows = np.stack(released(noise, 6))
    matrix = np.zeros((6, 6))
    for row, column in itertools.product(range(6), range(6)):
        if 0 <= row - column < bands:
            matrix[row, column] = root_coefficients(bands)[row - column]
    covariance = np.cov(matrix @ rows)
    assert np.abs(covariance - np.eye(6)).max() < 0.045  # six standard deviations of a covariance of 40,000
    assert np.abs(np.cov(rows) - np.eye(6)).max() > 0.2 or bands == 1


@pytest.mark.parametrize(("rounds", "expected"), [(16, 1.943879), (128, 2.610104), (1024, 3.272554), (2048, 3.493229)])
def test_the_sensitivity_of_one_participation_is_the_known_one(rounds: int, expected: float) -> None:
    assert BandedNoise(rounds=rounds, bands=rounds).sensitivity ** 2 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("rounds", "bands", "apart"), [(7, 1, 1), (7, 2, 2), (9, 3, 4), (8, 4, None), (5, 5, 9)])
def test_the_sensitivity_is_the_worst_of_all_participations(rounds: int, bands: int, apart: int | None) -> None:
    # "the sensitivity is exact, since participations `bands` rounds apart have columns that do not overlap."
    # "a client that takes part at most once in so many rounds as are asked for moves the noised sums by at most
    # the sensitivity that the event states."
    noise = BandedNoise(rounds=rounds, bands=bands, separation=apart)
    coefficients = root_coefficients(bands)
    matrix = np.array(
        [[coefficients[r - c] if 0 <= r - c < bands else 0.0 for c in range(rounds)] for r in range(rounds)]
    )
    worst = 0.0
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(rounds), k) for k in range(rounds + 1)):
        if all(b - a >= noise.apart for a, b in itertools.pairwise(chosen)):
            for signs in itertools.product([1.0, -1.0], repeat=len(chosen)):
                worst = max(worst, float(np.linalg.norm(matrix[:, list(chosen)] @ np.array(signs))))
    assert noise.sensitivity == pytest.approx(worst, rel=1e-12)
    event = noise.transform(2.0, 10.0).event()
    assert event == {"name": "matrix", "noise_multiplier": 2.0, "sensitivity": noise.sensitivity}


@pytest.mark.parametrize("kind", [TreeNoise(rounds=2), BandedNoise(rounds=2, bands=2)])
def test_no_round_is_released_beyond_those_that_the_noise_is_for(kind: TreeNoise | BandedNoise) -> None:
    # "a round beyond those that the noise is for raises PrivacyError."
    # "the server sees every update, and is trusted to add the noise and to forget the sum."
    noise = chain(ClipByNorm(1.0), kind.transform(1.0, 10.0))
    state = noise.init(ModelSpec.of_size(3))
    for _ in range(2):
        total, state = noise.decode(Total(torch.ones(3), 1.0, 1, {"loss": 1.0}), state, Draws.of(0))
        assert (total.weight, dict(total.sums)) == (10.0, {})
    with pytest.raises(PrivacyError, match="the noise was drawn for 2 rounds, and this is round 3"):
        noise.decode(Total(torch.ones(3), 1.0, 1), state, Draws.of(0))


@pytest.mark.parametrize("kind", [TreeNoise(rounds=2), BandedNoise(rounds=2, bands=2)])
def test_correlated_noise_too_needs_a_bound(kind: TreeNoise | BandedNoise) -> None:
    with pytest.raises(PrivacyError, match="has no finite bound to calibrate to; put ClipByNorm before it"):
        chain(kind.transform(1.0, 10.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeNoise(rounds=0), "rounds must be >= 1, got 0"),
        (lambda: TreeNoise(rounds=4, restart_every=5), "restart_every must be >= 1 and <= 4, got 5"),
        (lambda: BandedNoise(rounds=4, bands=5), "bands must be >= 1 and <= 4, got 5"),
        (lambda: BandedNoise(rounds=8, bands=4, separation=3), "separation must be >= 4, got 3"),
    ],
)
def test_impossible_schedules_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()
