"""The mechanism by itself: bounds and noise of every strategy that says what it adds.

Noise is fresh: what is right is rejected with a probability of 10^-6, what is wrong is wrong by far more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedml_core.model import ModelSpec
from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.transform import Chain, Transform
from fedml_core.update import Update
from fedml_core.weighting import Uniform
from simulations.audit.findings import Finding, Verdict, overall
from simulations.audit.mechanism import check_bound, check_noise
from strategies import CentralDP, FedAdam, FedAvg, LocalDP
from strategies.strategy import Strategy
from tests.simulations.audit.audit_cases import SABOTAGE, plain, private

SPEC = ModelSpec.of_size(2456)
TEMPLATE = Update.of(torch.ones(SPEC.size), 1.0, examples=10.0, loss=1.0)


def noise(strategy: Strategy) -> Finding:
    return check_noise(strategy, SPEC, torch.zeros(SPEC.size), seed=3)[0]


def bound(strategy: Strategy) -> Finding:
    return check_bound(strategy, SPEC, TEMPLATE, seed=3)


@pytest.mark.parametrize(
    "strategy",
    [
        private(),
        CentralDP(FedAdam(weighting=Uniform()), clip_norm=2.0, noise_multiplier=0.7, expected_cohort=4.5, delta=1e-5),
        CentralDP(plain(), clip_norm=AdaptiveClip(), noise_multiplier=1.0, expected_cohort=50.0, delta=1e-5),
        LocalDP(plain(), clip_norm=0.3, epsilon=4.0, delta=1e-5),
    ],
    ids=["fixed clip", "adam at the server", "adaptive clip", "local"],
)
def test_noise_that_is_as_configured_passes(strategy: Strategy) -> None:
    found = noise(strategy)
    assert found.verdict is Verdict.PASS, found.said
    assert found.numbers["ratio"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("half the noise", "standard deviation is 0."),
        ("noise not refreshed", "the same in two releases"),
        ("same seed per layer", "repeats from one coordinate to another"),
        ("noise after release", "standard deviation is 0.000"),
    ],
)
def test_noise_that_is_not_says_what_is_wrong(name: str, said: str) -> None:
    found = noise(private(SABOTAGE[name]))
    assert found.verdict is Verdict.FAIL
    assert said in found.said


@dataclass(frozen=True)
class _Laplace(Transform):
    """Some mechanism that an accountant knows and no replica does."""

    def event(self) -> Mapping[str, Any]:
        return {"name": "laplace", "scale": 1.0}


@dataclass(frozen=True, kw_only=True)
class _OfItsOwn(FedAvg):
    def pipeline(self) -> Transform:
        return Chain((_Laplace(),))


def test_noise_that_no_replica_measures_is_a_warning_and_no_pass() -> None:
    assert noise(_OfItsOwn()).verdict is Verdict.WARN
    assert noise(plain()).verdict is Verdict.INFO


def test_updates_of_every_length_are_clipped() -> None:
    found = bound(private())
    assert found.verdict is Verdict.PASS
    assert found.numbers["longest"] == pytest.approx(0.5, rel=1e-5)
    assert bound(plain()).verdict is Verdict.INFO


def test_a_bound_that_is_promised_and_not_kept_fails() -> None:
    found = bound(private(SABOTAGE["no clipping"]))
    assert found.verdict is Verdict.FAIL
    assert "passes where the noise relies on 0.5" in found.said


def test_the_worst_finding_decides() -> None:
    def of(*verdicts: Verdict) -> Verdict:
        return overall([Finding("x", verdict, "") for verdict in verdicts])

    assert of(Verdict.PASS, Verdict.WARN, Verdict.FAIL, Verdict.INFO) is Verdict.FAIL
    assert of(Verdict.WARN, Verdict.INFO) is Verdict.WARN
    assert of(Verdict.INFO) is Verdict.PASS
