"""Noise that is correlated over rounds: what is right passes, half of it and noise that is mixed otherwise do not.

Noise is fresh: what is right is rejected with a probability of 10^-6, what is wrong is wrong by far more than that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fedml_core.model import ModelSpec
from fedml_core.privacy.correlated import BandedNoise, Noise, ServerBanded, ServerTree, TreeNoise
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.transform import Chain, Draws, State, Transform
from fedml_core.update import Total
from fedml_core.weighting import Uniform
from simulations.audit.correlated_noise import mixing
from simulations.audit.findings import Finding, Verdict
from simulations.audit.mechanism import check_noise
from strategies import CentralDP, FedAdam, FedAvg
from tests.simulations.audit.audit_cases import plain

SPEC = ModelSpec.of_size(1500)
MECHANISMS: dict[str, Noise] = {
    "one tree": TreeNoise(rounds=9),
    "two trees and a half": TreeNoise(rounds=10, restart_every=4),
    "one round": TreeNoise(rounds=1),
    "a band": BandedNoise(rounds=12, bands=4),
    "independent": BandedNoise(rounds=5, bands=1),
    "more rounds than are measured": BandedNoise(rounds=100, bands=8),
}


def strategy(noise: Noise, inner: FedAvg | FedAdam | None = None, kind: type[CentralDP] = CentralDP) -> CentralDP:
    return kind(inner or plain(), clip_norm=0.7, noise_multiplier=1.3, expected_cohort=5.0, delta=1e-5, noise=noise)


def measured(wrapped: CentralDP, spec: ModelSpec = SPEC) -> Finding:
    return check_noise(wrapped, spec, torch.zeros(spec.size), seed=3)[0]


@pytest.mark.parametrize("name", MECHANISMS)
def test_correlated_noise_passes(name: str) -> None:
    found = measured(strategy(MECHANISMS[name]))
    assert found.verdict is Verdict.PASS, found.said
    assert found.numbers["ratio"] == pytest.approx(1.0, abs=0.08)
    assert found.numbers["configured_sd"] == pytest.approx(1.3 * 0.7, rel=0.05)


def test_what_a_server_makes_of_the_noise_does_not_matter() -> None:
    slow = replace(plain(), server_learning_rate=0.25)
    assert measured(strategy(TreeNoise(rounds=6), slow)).verdict is Verdict.PASS
    adam = measured(strategy(BandedNoise(rounds=6, bands=3), FedAdam(weighting=Uniform())))
    assert adam.verdict is Verdict.PASS, adam.said  # no multiple of the noise: the noise is measured by itself


def test_a_large_model_is_measured_by_a_part_of_it() -> None:
    found = measured(strategy(TreeNoise(rounds=3)), ModelSpec.of_size(300_000))
    assert found.verdict is Verdict.PASS
    assert found.numbers["draws"] == 6


def test_the_matrix_is_the_mechanism_s_own() -> None:
    # Prefix t of a tree carries as many nodes as t has binary ones, and two prefixes share those that both hold.
    made = mixing(TreeNoise(rounds=8), 8)
    assert made is not None
    prefixes = np.cumsum(made, axis=0)
    assert (prefixes**2).sum(axis=1).tolist() == [1, 1, 2, 1, 2, 2, 3, 1]
    assert float(prefixes[6] @ prefixes[5]) == 2.0  # 1-4 and 5-6
    banded = mixing(BandedNoise(rounds=4, bands=3), 4)
    assert banded is not None
    expected = np.array([[1, 0, 0, 0], [0.5, 1, 0, 0], [0.375, 0.5, 1, 0], [0, 0.375, 0.5, 1]])
    assert np.linalg.inv(banded) == pytest.approx(expected)


@dataclass(frozen=True)
class _HalfTree(ServerTree):
    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        return ServerTree(self.noise_multiplier / 2, self.expected_cohort, self.noise, bound=self.bound).decode(
            total, state, draws
        )


@dataclass(frozen=True)
class _HalfBand(ServerBanded):
    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        return ServerBanded(self.noise_multiplier / 2, self.expected_cohort, self.noise, bound=self.bound).decode(
            total, state, draws
        )


@dataclass(frozen=True)
class _FreshTree(ServerTree):
    """Adds fresh noise in every round, as strong as the tree's is on average, and takes none of it back."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        matrix = mixing(self.noise, self.noise.rounds)
        assert matrix is not None
        louder = float(np.sqrt((matrix**2).sum(axis=1).mean()))
        noised = self.lattice(len(total.values)).noised(total.values / louder, NoiseStream.fresh()) * louder
        return self.released(total, noised), state


@dataclass(frozen=True)
class _FreshBand(ServerBanded):
    """Adds the mechanism's fresh draws, and takes none of them back."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        noised = self.lattice(len(total.values)).noised(total.values, NoiseStream.fresh())
        return self.released(total, noised), state


@dataclass(frozen=True)
class _Sabotaged(CentralDP):
    def pipeline(self) -> Transform:
        chain = CentralDP.pipeline(self)
        assert isinstance(chain, Chain)
        *before, last = chain.parts
        assert isinstance(last, ServerTree | ServerBanded)
        other = self._kind()(last.noise_multiplier, last.expected_cohort, last.noise, bound=last.bound)  # type: ignore[arg-type]  # each kind has its own noise
        return Chain((*before, other))

    def _kind(self) -> type[ServerTree] | type[ServerBanded]:
        raise NotImplementedError


class _HalvedTree(_Sabotaged):
    def _kind(self) -> type[ServerTree]:
        return _HalfTree


class _HalvedBand(_Sabotaged):
    def _kind(self) -> type[ServerBanded]:
        return _HalfBand


class _IndependentTree(_Sabotaged):
    def _kind(self) -> type[ServerTree]:
        return _FreshTree


class _IndependentBand(_Sabotaged):
    def _kind(self) -> type[ServerBanded]:
        return _FreshBand


@pytest.mark.parametrize(
    ("noise", "kind"),
    [(TreeNoise(rounds=9), _HalvedTree), (BandedNoise(rounds=9, bands=4), _HalvedBand)],
    ids=["tree", "band"],
)
def test_half_the_noise_fails(noise: Noise, kind: type[CentralDP]) -> None:
    found = measured(strategy(noise, kind=kind))
    assert found.verdict is Verdict.FAIL
    assert "standard deviation is 0." in found.said
    assert found.numbers["ratio"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("noise", "kind"),
    [(TreeNoise(rounds=9), _IndependentTree), (BandedNoise(rounds=9, bands=4), _IndependentBand)],
    ids=["tree", "band"],
)
def test_independent_noise_where_correlated_noise_is_claimed_fails(noise: Noise, kind: type[CentralDP]) -> None:
    found = measured(strategy(noise, kind=kind))
    assert found.verdict is Verdict.FAIL
    assert found.numbers["rounds"] < 1e-6


@dataclass(frozen=True)
class _Forgets(ServerTree):
    """Takes other noise back than was added: new draws, as if keys were not kept."""

    def decode(self, total: Total, state: State, draws: Draws) -> tuple[Total, State]:
        wrong = {name: torch.randint(0, 256, (32,), dtype=torch.uint8) for name in state["keys"]}
        return ServerTree.decode(self, total, {**state, "keys": wrong}, draws)


class _Forgetful(_Sabotaged):
    def _kind(self) -> type[ServerTree]:
        return _Forgets


def test_noise_that_is_not_taken_back_fails() -> None:
    assert measured(strategy(TreeNoise(rounds=16), kind=_Forgetful)).verdict is Verdict.FAIL


@dataclass(frozen=True, kw_only=True)
class _Unknown(Noise):
    """Noise of somebody's own."""

    @property
    def apart(self) -> int:
        return self.rounds

    def transform(self, noise_multiplier: float, expected_cohort: float) -> Transform:
        return ServerTree(noise_multiplier, expected_cohort, TreeNoise(rounds=self.rounds))


def test_a_matrix_that_nobody_knows_is_none() -> None:
    assert mixing(_Unknown(rounds=3), 3) is None
