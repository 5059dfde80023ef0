"""Many clients at once through a dense model whose forward, backward and descent are written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulations.engines.batch_trainer import BatchTrainer, UnsupportedError
from simulations.engines.batched import Batched
from simulations.engines.engine import Stage
from simulations.engines.fused_trainer import FusedTrainer

__all__ = ["Fused"]


@dataclass(frozen=True, kw_only=True)
class Fused(Batched):
    """Trains stacks of linear layers by fused kernels on the CPU, K clients at once; anything else one by one."""

    name: ClassVar[str] = "fused"

    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return a trainer of the stage's task.

        Raises: UnsupportedError: if the task is no such stack, or is trained on another device.
        """
        if stage.trainer.device.type != "cpu":
            raise UnsupportedError(f"the fused engine computes on the CPU, not on {stage.trainer.device}")
        return FusedTrainer(stage.task, stage.seed)
