"""Many clients at once through any model that torch can vectorise: the generic way, and the one for GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simulations.engines.batch_trainer import BatchTrainer
from simulations.engines.batched import Batched
from simulations.engines.engine import Session, Stage
from simulations.engines.resident import resident
from simulations.engines.vmap_trainer import VmapTrainer

if TYPE_CHECKING:
    from simulations.private_clients import PrivateClients

__all__ = ["Vectorised"]


@dataclass(frozen=True, kw_only=True)
class Vectorised(Batched):
    """Trains K clients side by side with `torch.vmap`; a model that it cannot run is trained one by one."""

    name: ClassVar[str] = "vectorised"
    protects_examples: ClassVar[bool] = True

    def open(self, stage: Stage) -> Session:
        """Return a session with a trainer of its own, and on a GPU with the examples there, if they fit."""
        if stage.private is not None:
            return super().open(stage)
        return super().open(dataclasses.replace(stage, population=resident(stage.population, stage.trainer.device)))

    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return a trainer of the stage's task on its device.

        Raises: UnsupportedError: for a model that cannot be vectorised.
        """
        if stage.private is not None:
            return _private_trainer(stage, stage.private)
        return VmapTrainer(stage.task, stage.seed, device=str(stage.trainer.device))


def _private_trainer(stage: Stage, clients: PrivateClients) -> BatchTrainer:
    from simulations.engines.private_vmap import PrivateVmapTrainer  # loads Opacus, which other runs do without

    return PrivateVmapTrainer(stage.task, clients, stage.seed, device=str(stage.trainer.device))
