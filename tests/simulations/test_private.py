"""Whole simulated runs with differential privacy: they learn, on every engine, and resume with their books."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedml_core import Training
from fedml_core.privacy.adaptive_clip import AdaptiveClip
from fedml_core.privacy.correlated import BandedNoise, TreeNoise
from fedml_core.weighting import Uniform
from server import MinimumSeparation, PoissonSampling, Sampling
from simulations import Engine, Fused, Processes, Sequential, simulate
from strategies import CentralDP, FedAvg, LocalDP, Strategy
from tests.simulations.test_simulate import TASK

EVENLY = FedAvg(weighting=Uniform())
CENTRAL = CentralDP(EVENLY, 2.0, 0.5, 50.0, 1e-5)
ADAPTIVE = CentralDP(EVENLY, AdaptiveClip(initial=0.5), 0.5, 50.0, 1e-5)
TREE = CentralDP(EVENLY, 2.0, 0.5, 50.0, 1e-5, TreeNoise(rounds=12, restart_every=4))
BANDED = CentralDP(EVENLY, 2.0, 0.5, 50.0, 1e-5, BandedNoise(rounds=12, bands=4))
LOCAL = LocalDP(EVENLY, 2.0, 100.0, 1e-5)
POISSON, APART = PoissonSampling(0.25), MinimumSeparation(4)
# Steps large enough to learn in 12 rounds; the noise on the mean is 0.02 to 0.03 on weights of about 1.
SETTINGS: dict[str, Any] = {
    "clients": 200,
    "training": Training(batch_size=8, learning_rate=1.0, epochs=2),
}


@pytest.mark.parametrize("engine", [Sequential(), Fused(), Processes(workers=2)], ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    ("strategy", "sampling"),
    [(CENTRAL, POISSON), (ADAPTIVE, POISSON), (TREE, APART), (BANDED, APART), (LOCAL, POISSON)],
    ids=["central", "adaptive", "tree", "banded", "local"],
)
def test_private_strategies_learn_on_every_engine(strategy: Strategy, sampling: Sampling, engine: Engine) -> None:
    history = simulate(TASK, strategy, rounds=12, sampling=sampling, engine=engine, **SETTINGS)
    assert history.metric("server.accuracy")[-1] > 0.8
    assert not [row for report in history.reports for row in report.excluded]
    spent = [report.epsilon or 0.0 for report in history.reports]
    assert spent[0] > 0 and spent == sorted(spent)


@pytest.mark.parametrize(("strategy", "sampling"), [(ADAPTIVE, POISSON), (TREE, APART), (BANDED, APART)])
def test_a_resumed_private_run_goes_on_with_its_noise_and_its_books(
    tmp_path: Path, strategy: Strategy, sampling: Sampling
) -> None:
    whole = simulate(TASK, strategy, rounds=12, sampling=sampling, **SETTINGS)
    simulate(TASK, strategy, rounds=7, out=tmp_path / "run", sampling=sampling, **SETTINGS)
    resumed = simulate(TASK, strategy, rounds=12, out=tmp_path / "run", resume=True, sampling=sampling, **SETTINGS)
    assert [report.epsilon for report in resumed.reports] == [report.epsilon for report in whole.reports]
    assert resumed.metric("server.accuracy")[-1] > 0.8


def test_local_noise_leaves_no_metric_of_a_single_client_or_of_all() -> None:
    history = simulate(TASK, LOCAL, rounds=2, sampling=POISSON, **SETTINGS)
    assert history.metric("train.loss") == []
