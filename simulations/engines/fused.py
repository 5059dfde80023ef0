"""Many clients at once through a dense model whose forward, backward and descent are written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from simulations.engines.batch_trainer import BatchTrainer, UnsupportedError
from simulations.engines.batched import Batched, clients_that_fit
from simulations.engines.engine import Stage
from simulations.engines.fused_trainer import FusedTrainer

__all__ = ["Fused"]

# Examples of the clients of one chunk that a processor's last cache holds with what is made of them.
_EXAMPLE_BYTES = 24 << 20
_ASKED = 64


@dataclass(frozen=True, kw_only=True)
class Fused(Batched):
    """Trains stacks of linear layers by fused kernels on the CPU, K clients at once; anything else one by one."""

    name: ClassVar[str] = "fused"

    def fitting(self, stage: Stage, cohort: Sequence[int]) -> int:
        """Return how many clients' parameters fit the caches, or examples where these are smaller.

        Most of a wide first layer's weights are never made, so that its inputs are what must fit.
        """
        held = clients_that_fit(stage)
        counts = stage.population.counts(cohort[:_ASKED])
        if counts is None or not len(counts):
            return held
        widest = max((tensor.shape[-1] for tensor in stage.trainer.spec.parameters if tensor.shape), default=1)
        return max(held, int(_EXAMPLE_BYTES / (4 * widest * max(1.0, float(counts.mean())))))

    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return a trainer of the stage's task.

        Raises: UnsupportedError: if the task is no such stack, or is trained on another device.
        """
        if stage.trainer.device.type != "cpu":
            raise UnsupportedError(f"the fused engine computes on the CPU, not on {stage.trainer.device}")
        return FusedTrainer(stage.task, stage.seed)
