"""Many clients at once through any model that torch can vectorise: the generic way, and the one for GPUs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from fedml_core.errors import ConfigError
from simulations.engines.batch_trainer import BatchTrainer
from simulations.engines.batched import Batched
from simulations.engines.engine import Session, Stage
from simulations.engines.resident import resident
from simulations.engines.sequential import OneByOne
from simulations.engines.vmap_trainer import VmapTrainer
from simulations.private_clients import NOISE_IS_FRESH, PrivateClients

__all__ = ["Vectorised"]


@dataclass(frozen=True, kw_only=True)
class Vectorised(Batched):
    """Trains K clients side by side with `torch.vmap`; a model that it cannot run is trained one by one.

    `deterministic`: only algorithms that give the same bits each time, on a GPU too; one that torch lacks ends the run.
    """

    deterministic: bool = False
    name: ClassVar[str] = "vectorised"
    protects_examples: ClassVar[bool] = True

    def open(self, stage: Stage) -> Session:
        """Return a session with a trainer of its own, and on a GPU with the examples there, if they fit.

        Raises: ConfigError: for `deterministic` where clients draw noise.
        """
        if stage.private is not None:
            if self.deterministic:
                raise ConfigError(NOISE_IS_FRESH)
            return super().open(stage)
        return super().open(dataclasses.replace(stage, population=resident(stage.population, stage.trainer.device)))

    def one_by_one(self, stage: Stage) -> OneByOne:
        """Return what does the clients that cannot be vectorised, as deterministically."""
        return OneByOne(stage, self.skip_failures, deterministic=self.deterministic)

    def trainer(self, stage: Stage) -> BatchTrainer:
        """Return a trainer of the stage's task on its device.

        Raises: UnsupportedError: for a model that cannot be vectorised.
        """
        if stage.private is not None:
            return _private_trainer(stage, stage.private)
        device = str(stage.trainer.device)
        return VmapTrainer(stage.task, stage.seed, device=device, deterministic=self.deterministic)


def _private_trainer(stage: Stage, clients: PrivateClients) -> BatchTrainer:
    from simulations.engines.private_vmap import PrivateVmapTrainer  # loads Opacus, which other runs do without

    return PrivateVmapTrainer(stage.task, clients, stage.seed, device=str(stage.trainer.device))
