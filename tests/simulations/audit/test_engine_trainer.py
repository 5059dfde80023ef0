"""An engine with a private step of its own is attacked by what it computes, and found out where that is not private."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from clients.memory import InProcessMemory
from clients.private_training import PrivateTraining
from fedml_core.errors import StrategyError, TaskError
from fedml_core.privacy.events import canonical
from fedml_core.transform import Guide
from simulations.audit.engine_trainer import EngineTrainer, own_engine
from simulations.audit.example_audit import audit_examples, site_of
from simulations.audit.example_mechanism import check_batches, check_example_clipping, check_example_noise
from simulations.audit.example_site import ExampleSite, Make
from simulations.audit.findings import Finding, Verdict, overall
from simulations.engines.auto import Auto
from simulations.engines.batch_trainer import BatchTrainer, BatchWork, Trained
from simulations.engines.engine import Engine, Stage
from simulations.engines.fused import Fused
from simulations.engines.sequential import Sequential
from simulations.engines.suited import Suited, suitable
from simulations.engines.tuned import Tuned
from simulations.engines.vectorised import Vectorised
from simulations.packing import Packed
from simulations.private_clients import PrivateClients
from tests.simulations.audit.audit_cases import examples, federation, plain, same_noise, task
from tests.simulations.audit.example_cases import TRAINING, private_of, site
from tests.simulations.engines.engine_cases import TrainedRows

__all__ = ["same_noise"]

pytestmark = pytest.mark.usefixtures("same_noise")


def by(engine: Engine) -> Callable[[PrivateTraining], Make]:
    return lambda private: lambda a_task, reserve: EngineTrainer(a_task, private, reserve, engine, seed=0, device="cpu")


def attacked(engine: Engine, **settings: Any) -> ExampleSite:
    return dataclasses.replace(site(by(engine), **settings), engine=engine.name)


def test_the_vectorised_engine_passes_by_what_it_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.private_trainer.PrivateTorchTrainer.train", lambda *_, **__: pytest.fail("one by one"))
    own = attacked(Vectorised())
    audited = audit_examples(own, canaries=500)
    assert overall(audited.findings) is Verdict.PASS, [one.said for one in audited.findings]
    assert "trained by the vectorised engine" in audited.findings[0].said
    assert [canonical(event) for event in own.account.reserved] == [canonical(event) for event in own.account.asked]


class _Blind(PrivateClients):
    """Believes that whatever is trained was charged."""

    def require_charged(self, event: Mapping[str, Any]) -> None:
        """Accept."""


@dataclass(frozen=True, kw_only=True)
class _Other(Vectorised):
    """Trains otherwise than the stage says."""

    def trainer(self, stage: Stage) -> BatchTrainer:
        assert stage.private is not None
        blind = _Blind(self.changed(stage.private.private), stage.private.event)
        return self.wrapped(super().trainer(dataclasses.replace(stage, private=blind)))

    def changed(self, private: PrivateTraining) -> PrivateTraining:
        return private

    def wrapped(self, trainer: BatchTrainer) -> BatchTrainer:
        return trainer


class _HalfNoise(_Other):
    def changed(self, private: PrivateTraining) -> PrivateTraining:
        return dataclasses.replace(private, noise_multiplier=private.noise_multiplier / 2)


class _NoClipping(_Other):
    def changed(self, private: PrivateTraining) -> PrivateTraining:
        longer = dataclasses.replace(private.clipping, clip_norm=private.clipping.clip_norm * 1e3)
        return dataclasses.replace(private, clipping=longer, noise_multiplier=private.noise_multiplier / 1e3)


class _TwiceTheRate(_Other):
    def changed(self, private: PrivateTraining) -> PrivateTraining:
        return dataclasses.replace(private, sampling_rate=2 * private.sampling_rate)


@dataclass
class _Wrapped(BatchTrainer):
    inner: BatchTrainer


class _OneForAll(_Wrapped):
    """Draws one client's noise and gives it to all."""

    def descend(self, work: BatchWork) -> Trained:
        update = self.inner.train(work)
        return TrainedRows(update.replace(values=update.values[:1].expand_as(update.values).clone()))


class _FirstQuarter(_Wrapped):
    """Takes batches of one size."""

    def descend(self, work: BatchWork) -> Trained:
        offsets, data = work.packed.offsets, work.packed.examples
        rows = [
            np.random.default_rng(work.round).permutation(np.arange(low, high))[: (high - low) // 4]
            for low, high in itertools.pairwise(offsets)
        ]
        part = Packed.of([data.take(torch.from_numpy(row)) for row in rows])
        return self.inner.descend(dataclasses.replace(work, packed=part))


class _SharedNoise(_Other):
    def wrapped(self, trainer: BatchTrainer) -> BatchTrainer:
        return _OneForAll(trainer)


class _OneSize(_Other):
    def changed(self, private: PrivateTraining) -> PrivateTraining:
        return dataclasses.replace(private, sampling_rate=1.0)

    def wrapped(self, trainer: BatchTrainer) -> BatchTrainer:
        return _FirstQuarter(trainer)


def _noise(own: ExampleSite) -> Finding:
    return check_example_noise(own)[0]


def _batches(own: ExampleSite) -> Finding:
    return check_batches(own)[0]


@pytest.mark.parametrize(
    ("engine", "test", "said"),
    [
        (_HalfNoise(), _noise, "standard deviation is 0.5"),
        (_NoClipping(), check_example_clipping, "times the clip norm"),
        (_TwiceTheRate(), _batches, "batch sizes are not Binomial"),
        (_SharedNoise(), _noise, "the same in two releases"),
        (_OneSize(), _batches, "Poisson sampling is claimed"),
    ],
    ids=["half the noise", "no clipping", "twice the rate", "one noise for all clients", "batches of one size"],
)
def test_each_sabotage_of_an_engine_fails(engine: Engine, test: Callable[[ExampleSite], Finding], said: str) -> None:
    found = test(attacked(engine))
    assert found.verdict is Verdict.FAIL
    assert said in found.said


@pytest.mark.parametrize("rate", [1.0, 0.02])
def test_batches_of_any_rate_are_counted(rate: float) -> None:
    found = _batches(attacked(Vectorised(), rate=rate))
    assert found.verdict is Verdict.PASS, found.said


def test_an_engine_is_attacked_where_it_has_a_step_of_its_own() -> None:
    simulation = dataclasses.replace(federation(plain()), private=private_of())

    def chosen(engine: Engine) -> Engine | None:
        return own_engine(dataclasses.replace(simulation, engine=engine))

    vectorised = Vectorised(clients_at_once=2)
    assert chosen(vectorised) is vectorised
    assert chosen(Tuned(threads=1, inner=vectorised)) is vectorised
    assert chosen(Sequential()) is None
    suits = suitable(simulation.stage(InProcessMemory()))
    assert type(chosen(Suited())) is (Vectorised if isinstance(suits, Vectorised) else type(None))
    assert isinstance(chosen(Auto()), Vectorised)
    own = site_of(dataclasses.replace(simulation, engine=vectorised), [], seed=1)
    assert own is not None
    assert own.engine == "vectorised"
    assert site_of(federation(plain()), [], seed=1) is None


def test_an_engine_s_failure_is_told() -> None:
    def refuse(event: Any) -> None:
        raise TaskError("no account")

    trainer = EngineTrainer(task, private_of(), refuse, Vectorised(), seed=0, device="cpu")
    with pytest.raises(TaskError, match="no account"):
        trainer.train(trainer.initial(), examples(8), TRAINING, round_number=1, key=(1, "x"))
    with pytest.raises(StrategyError, match="leave the guide out"):
        trainer.train(trainer.initial(), examples(8), TRAINING, round_number=1, key=(1, "x"), guide=Guide(mu=1.0))
    unable = EngineTrainer(task, private_of(), lambda event: None, Fused(), seed=0, device="cpu")
    found = check_example_noise(dataclasses.replace(site(), make=lambda a_task, reserve: unable))[0]
    assert found.verdict is Verdict.FAIL
    assert "a private training on nothing failed" in found.said
