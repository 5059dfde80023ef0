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
from simulations.engines.threaded import Threaded
from simulations.engines.vectorised import Vectorised

__all__ = ["Suited", "suitable"]


@dataclass(frozen=True, kw_only=True)
class Suited(Engine):
    """Takes the engine that suits the model and the device, without trying: what `auto` mostly finds, in one process.

    On a CPU dense stacks are fused, small ones in one thread, and everything else is trained one by one; on a GPU
    clients train side by side. The choice depends on the task and the kind of device alone, so a run that is repeated
    or resumed on such a machine gives equal bits, as the engine that is chosen does.
    """

    name: ClassVar[str] = "suited"

    def open(self, stage: Stage) -> Session:
        """Return a session of the engine that suits the stage."""
        return suitable(stage, skip_failures=self.skip_failures).open(stage)


def suitable(stage: Stage, *, skip_failures: bool = False) -> Engine:
    """Return the engine that suits a stage's task and device.

    Raises: TaskError: if the model cannot be built.
    """
    if stage.trainer.device.type == "cuda":
        return _able(Vectorised(skip_failures=skip_failures), stage)
    engine = _able(Fused(skip_failures=skip_failures), stage)
    threads = fitting_threads(stage.task.build(stage.seed))
    if isinstance(engine, Sequential) or threads is None:
        return engine
    return Threaded(threads=threads, inner=engine, skip_failures=skip_failures)


def _able(engine: Batched, stage: Stage) -> Engine:
    try:
        engine.trainer(stage)
    except UnsupportedError:
        return Sequential(skip_failures=engine.skip_failures)
    return engine
