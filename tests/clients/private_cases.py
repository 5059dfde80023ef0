"""Small private trainings, and the plainest clipped sum to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clients.per_example import FlatClipping, LossOf, losses_of
from clients.private_trainer import PrivateTorchTrainer
from clients.private_training import PrivateTraining
from fedml_core.data import Data
from fedml_core.forward import Forward
from fedml_core.minibatches import Batch
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.update import Update
from tests.clients.trainer_cases import KEY, classification, drawn

Event = Mapping[str, Any]


class Words(nn.Module):
    """Tokens: an embedding, a dense layer over positions, a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.dense = nn.Linear(6, 5)
        self.normal = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.last(torch.relu(self.normal(self.dense(self.table(tokens)))).mean(dim=1))
        return hidden


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.dense(torch.relu(self.dense(values))))
        return hidden


class Images(nn.Module):
    """Two convolutions, of which the second has few places and many weights, and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2)
        self.normal, self.last = nn.GroupNorm(4, 16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.normal(torch.relu(self.deep(torch.relu(self.wide(images))))).mean(dim=(2, 3)))
        return hidden


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def frozen() -> nn.Module:
    made = dense()
    for parameter in made[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    return made


def _signal() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


_TOKENS = torch.randint(0, 20, (9, 7), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "dense": (dense, drawn(9, 5)),
    "frozen": (frozen, drawn(9, 5)),
    "words": (Words, _TOKENS),
    "twice": (Twice, drawn(9, 5)),
    "images": (Images, drawn(9, 3, 12, 12)),
    "signal": (_signal, drawn(9, 2, 6)),
}


def built(model: Callable[[], nn.Module]) -> tuple[nn.Module, LossOf]:
    """Return a module in train mode and its losses."""
    task = classification(model)
    module = task.build(0).train()
    return module, losses_of(Forward(task, module, "in a test", nullcontext()))


def batch_of(inputs: Tensor, weights: Tensor | None = None) -> Batch:
    targets = torch.randint(0, 3, (len(inputs),), generator=torch.Generator().manual_seed(2))
    return (inputs,), targets, weights


def gradients(module: nn.Module, losses: LossOf, batch: Batch) -> list[Tensor]:
    """Return each example's gradient, by autograd for one example after the other."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = []
    for place in range(len(batch[1])):
        alone = slice(place, place + 1)
        example = tuple(t[alone] for t in batch[0]), batch[1][alone], None if batch[2] is None else batch[2][alone]
        found = torch.autograd.grad(losses(example).sum(), parameters)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in found]))
    return rows


def joined(sums: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in sums])


def private_of(**changes: Any) -> PrivateTraining:
    given: dict[str, Any] = {"noise_multiplier": 1.0, "clipping": FlatClipping(1.0), "sampling_rate": 0.5, **changes}
    return PrivateTraining(**given)


def trainer_of(
    task: Task | None = None,
    private: PrivateTraining | None = None,
    reserve: Callable[[Event], None] = lambda event: None,
    **rest: Any,
) -> PrivateTorchTrainer:
    return PrivateTorchTrainer(task or classification(), private or private_of(), reserve, device="cpu", **rest)


def trained(trainer: PrivateTorchTrainer, data: Data, training: Training | None = None, **rest: Any) -> Update:
    arguments: dict[str, Any] = {"round_number": 1, "key": KEY, **rest}
    return trainer.train(trainer.initial(), data, training or Training(steps=3, batch_size=4), **arguments)
