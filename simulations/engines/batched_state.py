"""K clients' parameters, their buffers and their optimizers' memory, and one step of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml_core.errors import StrategyError
from fedml_core.model import ModelSpec
from fedml_core.transform import Guide
from simulations.engines.batch_trainer import UnsupportedError
from simulations.engines.batched_linear import Factors
from simulations.engines.functional_optimizers import FunctionalOptimizer

__all__ = ["BatchedState", "Steering"]

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Steering:
    """What is done to K gradients before the optimizer: as `clients.local_step.Steering`, client by client.

    `starts`: each parameter where all began. `offsets`: (K, *shape) or (*shape) each, in the chunk's order.
    """

    mu: float
    starts: tuple[Tensor, ...] = field(repr=False)
    offsets: tuple[Tensor, ...] = field(repr=False)
    each: bool
    max_norm: float | None

    @classmethod
    def of(cls, guide: Guide, spec: ModelSpec, start: Tensor, order: Tensor, max_norm: float | None) -> Steering:
        """Return the steering of a chunk whose row k is client `order[k]` of the guide's offset.

        Raises: StrategyError: for an offset of another shape than (p,) or (K, p).
        """
        count, offset = spec.parameter_count, guide.offset
        starts = tuple(_parts(start, spec))
        if offset is None:
            return cls(guide.mu, starts, (), False, max_norm)
        if offset.shape not in ((count,), (len(order), count)):
            raise StrategyError(
                f"a guide's offset must have shape ({count},) or ({len(order)}, {count}), got {tuple(offset.shape)}"
            )
        offset = offset.to(start.device)
        each = offset.dim() == 2
        return cls(guide.mu, starts, tuple(_parts(offset[order] if each else offset, spec)), each, max_norm)

    @property
    def guided(self) -> bool:
        """Return whether gradients are moved, even those that the loss does not reach."""
        return bool(self.mu or self.offsets)

    def apply(self, places: Sequence[int], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the steered gradients of the parameters at `places`."""
        if self.mu:
            moved = [parameter - self.starts[at] for at, parameter in zip(places, parameters, strict=True)]
            gradients = list(torch._foreach_add(gradients, moved, alpha=self.mu))
        if self.offsets:
            active = len(parameters[0])
            offsets = [self.offsets[at][:active] if self.each else self.offsets[at] for at in places]
            gradients = [gradient + offset for gradient, offset in zip(gradients, offsets, strict=True)]
        if self.max_norm is None:
            return gradients
        norms = [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients]
        # torch.nn.utils.clip_grad_norm_ has the same 1e-6.
        scale = (self.max_norm / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1.0)
        return [gradient * scale.view(-1, *[1] * (gradient.dim() - 1)) for gradient in gradients]


class BatchedState:
    """One block (K, *shape) for each tensor of a model; the clients that still train are a prefix of it."""

    def __init__(self, spec: ModelSpec, start: Tensor, clients: int, blocks: list[Tensor] | None = None) -> None:
        self._spec, self._start, self._clients = spec, start, clients
        self._count = len(spec.parameters)
        if blocks is None or len(blocks[0]) < clients:
            tensors = (*spec.parameters, *spec.buffers)
            blocks = [torch.empty((clients, *tensor.shape), device=start.device) for tensor in tensors]
        self.blocks = blocks
        for block, part in self._from_start():
            block.copy_(part)
        self._ended = False
        self._slots: list[list[Tensor]] = []
        self._used: tuple[int, ...] | None = None
        self._active, self._prefix, self._slot_prefix = 0, list[Tensor](), list[list[Tensor]]()

    def tensors(self, active: int) -> list[Tensor]:
        """Return the first `active` clients' parameters, as leaves of a graph to come, and buffers: views."""
        if active != self._active:
            self._active = active
            self._prefix = _leaves([block[:active] for block in self.blocks], self._count)
            self._slot_prefix = [[block[:active] for block in slot] for slot in self._slots]
        return self._prefix

    def parts(self, active: int, places: slice | Tensor) -> list[Tensor]:
        """Return some of them: views for a slice, copies otherwise, whose buffers `put_back` returns."""
        return _leaves([tensor.detach()[places] for tensor in self.tensors(active)], self._count)

    def put_back(self, places: slice | Tensor, tensors: Sequence[Tensor]) -> None:
        """Store the buffers of copies."""
        if isinstance(places, Tensor):
            for block, part in zip(self.blocks[self._count :], tensors[self._count :], strict=True):
                block.index_copy_(0, places, part)

    @torch.no_grad()
    def step(
        self,
        optimizer: FunctionalOptimizer,
        steering: Steering,
        gradients: Gradients,
        number: int,
        factors: Sequence[Factors] = (),
    ) -> None:
        """Take step `number`, from 1, of the clients whose gradients these are.

        Args: factors: of weights' gradients, or of parts of them, that were not made; for a plain optimizer's step.
        Raises: UnsupportedError: if the loss reaches other parameters than at the first step.
        """
        parameters = self._prefix[: self._count]
        left = {id(weight) for weight, _, _ in factors}
        if steering.guided:
            gradients = [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ]
        used = tuple(
            place for place, gradient in enumerate(gradients) if gradient is not None or id(parameters[place]) in left
        )
        if self._used is None:
            self._begin(used, optimizer)
        elif used != self._used:
            raise UnsupportedError(
                "the loss reaches other parameters at each step, which torch's optimizers tell apart"
            )
        given = [parameters[place] for place in used if gradients[place] is not None]
        found = [gradient for gradient in gradients if gradient is not None]
        if steering.guided or steering.max_norm is not None:
            found = steering.apply(used, given, found)
        optimizer.step(given, found, self._slot_prefix, number)
        for weight, above, values in factors:
            weight.baddbmm_(above.mT, values, alpha=-optimizer.rate)

    def moved(self) -> list[Tensor]:
        """Return how far each tensor has moved, (K, *shape); no step may follow."""
        if not self._ended:
            self._ended = True
            for block, start in self._from_start():
                block.sub_(start)
        return [block for block, _ in self._from_start()]

    def _from_start(self) -> Iterator[tuple[Tensor, Tensor]]:
        for block, start in zip(self.blocks, self._spec.views(self._start).values(), strict=True):
            yield block[: self._clients], start

    def _begin(self, used: tuple[int, ...], optimizer: FunctionalOptimizer) -> None:
        self._used = used
        self._slots = [
            [torch.full_like(self.blocks[place][: self._clients], value) for place in used] for value in optimizer.slots
        ]
        self._slot_prefix = [[block[: self._active] for block in slot] for slot in self._slots]


def _leaves(tensors: list[Tensor], parameters: int) -> list[Tensor]:
    return [tensor.detach().requires_grad_(place < parameters) for place, tensor in enumerate(tensors)]


def _parts(vectors: Tensor, spec: ModelSpec) -> list[Tensor]:
    lead = vectors.shape[:-1]
    return [
        vectors[..., tensor.offset : tensor.offset + tensor.size].reshape((*lead, *tensor.shape))
        for tensor in spec.parameters
    ]
