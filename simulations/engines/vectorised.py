"""Many clients at once through any model that torch can vectorise: the generic way, and the one for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from simulations.engines.batch_trainer import BatchTrainer
from simulations.engines.batched import Batched
from simulations.engines.engine import Stage
from simulations.engines.vmap_trainer import VmapTrainer

__all__ = ["Vectorised"]


@dataclass(frozen=True, kw_only=True)
class Vectorised(Batched):
    """Trains K clients side by side with `torch.vmap`; a model that it cannot run is trained one by one."""

    name: ClassVar[str] = "vectorised"

    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return a trainer of the stage's task on its device.

        Raises: UnsupportedError: for a model that cannot be vectorised.
        """
        return VmapTrainer(stage.task, stage.seed, device=str(stage.trainer.device))
