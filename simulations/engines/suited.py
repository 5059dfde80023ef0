"""The engine that suits a model by rule: nothing is measured, so that the same run gives the same bits each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedml_core.devices import fitting_threads
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched import Batched
from simulations.engines.engine import Engine, Session, Stage
from simulations.engines.fused import Fused
from simulations.engines.sequential import Sequential
from simulations.engines.tuned import Tuned
from simulations.engines.vectorised import Vectorised

__all__ = ["Suited", "suitable"]

# Parameters up to which private training side by side is faster on a CPU: of dense stacks, and of everything else.
_MOST_FACTORED, _MOST_MADE = 200_000, 20_000


@dataclass(frozen=True, kw_only=True)
class Suited(Engine):
    """Takes the engine that suits the model and the device, without trying: what `auto` mostly finds, in one process.

    On a CPU dense stacks are fused, small ones in one thread, and everything else is trained one by one; clients that
    protect their examples train side by side where the model is small. On a GPU all clients do. The choice depends on
    the task and the kind of device alone, so a run that is repeated or resumed on such a machine gives equal bits, as
    the engine that is chosen does.
    """

    name: ClassVar[str] = "suited"
    protects_examples: ClassVar[bool] = True

    def open(self, stage: Stage) -> Session:
        """Return a session of the engine that suits the stage."""
        return suitable(stage, skip_failures=self.skip_failures).open(stage)


def suitable(stage: Stage, *, skip_failures: bool = False) -> Engine:
    """Return the engine that suits a stage's task and device.

    Raises: TaskError: if the model cannot be built.
    """
    if stage.trainer.device.type == "cuda":
        return _able(Vectorised(skip_failures=skip_failures), stage)
    if stage.private is not None:
        return _private(stage, skip_failures=skip_failures)
    engine = _able(Fused(skip_failures=skip_failures), stage)
    threads = fitting_threads(stage.task.build(stage.seed))
    if isinstance(engine, Sequential) or threads is None:
        return engine
    return Tuned(threads=threads, inner=engine, skip_failures=skip_failures)


def _private(stage: Stage, *, skip_failures: bool) -> Engine:
    """Return what suits clients that protect their examples: of large models, gradients of examples fill the caches."""
    from simulations.engines.private_dense import DenseLayers

    most = _MOST_FACTORED if DenseLayers(stage.task.build(stage.seed)).able else _MOST_MADE
    if stage.trainer.spec.size > most:
        return Sequential(skip_failures=skip_failures)
    return _able(Vectorised(skip_failures=skip_failures), stage)


def _able(engine: Batched, stage: Stage) -> Engine:
    try:
        engine.trainer(stage)
    except UnsupportedError:
        return Sequential(skip_failures=engine.skip_failures)
    return engine
