"""The model as one vector: what travels of a torch module, in which order, and under which fingerprint.

What travels: every trainable parameter once (tied weights are one), then every persistent floating-point buffer, such
as BatchNorm's running statistics, which are averaged like parameters but never touched by a server optimizer's moments.
What stays: frozen parameters (both sides must hold equal ones: their digest is in the fingerprint), integer and boolean
buffers such as BatchNorm's batch counter (each side keeps its own), and buffers that the module does not persist.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedml_core.errors import SpecMismatchError, TaskError

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a model: its shape, its torch dtype by name, and where it starts in the vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size(self) -> int:
        """Return the number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelSpec:
    """The layout of a model's vector of `size` float32 numbers: parameters first, then buffers.

    Example:
        >>> spec = ModelSpec.of(nn.Linear(2, 1))
        >>> spec.size, [tensor.name for tensor in spec.parameters]
        (3, ['weight', 'bias'])
    """

    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...] = ()
    frozen_digest: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> ModelSpec:
        """Return the spec of `module`.

        Raises: TaskError: if nothing is trainable, a trainable parameter is not real floating point, or a tensor is
            lazy (without a shape yet).
        """
        for name, tensor in _tensors(module).items():
            if nn.parameter.is_lazy(tensor):
                raise TaskError(f"{name} has no shape yet; let model() run its lazy module on one batch first")
        parameters = dict(_trainable(module))
        if not parameters:
            raise TaskError(f"{type(module).__name__} has no trainable parameter; unfreeze at least one")
        for name, parameter in parameters.items():
            if parameter.dtype not in _FLOATS:
                raise TaskError(f"parameter {name} is {parameter.dtype}; trainable parameters must be real floats")
        first = _layout(parameters.items(), 0)
        end = first[-1].offset + first[-1].size
        return cls(first, _layout(_averaged_buffers(module), end), _frozen_digest(module))

    @classmethod
    def of_size(cls, size: int) -> ModelSpec:
        """Return the spec of one nameless float32 vector of `size` numbers, for use without a torch module."""
        return cls((TensorSpec("vector", (size,), "float32", 0),))

    @cached_property
    def parameter_count(self) -> int:
        """Return how many of the vector's leading numbers are trainable parameters."""
        return sum(tensor.size for tensor in self.parameters)

    @cached_property
    def size(self) -> int:
        """Return d, the length of the vector."""
        return self.parameter_count + sum(tensor.size for tensor in self.buffers)

    @cached_property
    def fingerprint(self) -> str:
        """Return 32 hexadecimal digits that differ when names, shapes, dtypes, order or frozen values differ."""
        body = json.dumps(self.to_config(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()[:32]

    def flatten(self, module: nn.Module) -> Tensor:
        """Return a new float32 vector of shape (d,) on the module's device."""
        tensors = _tensors(module)
        parts = [tensors[tensor.name].detach().reshape(-1).float() for tensor in (*self.parameters, *self.buffers)]
        return torch.cat(parts)

    @torch.no_grad()
    def load(self, vector: Tensor, module: nn.Module) -> None:
        """Copy `vector` (d,) into `module`, cast to each tensor's own dtype; nothing else of it is touched.

        Raises: SpecMismatchError: if the vector is not of shape (d,).
        """
        if vector.shape != (self.size,):
            raise SpecMismatchError(f"a vector of shape ({self.size},) fits this model, got {tuple(vector.shape)}")
        tensors = _tensors(module)
        for tensor in (*self.parameters, *self.buffers):
            part = vector[tensor.offset : tensor.offset + tensor.size]
            tensors[tensor.name].copy_(part.view(tensor.shape))

    def views(self, vectors: Tensor) -> dict[str, Tensor]:
        """Return each tensor's part of `vectors` (..., d) as a view of shape (..., *shape), by name, still float32."""
        lead = vectors.shape[:-1]
        return {
            tensor.name: vectors[..., tensor.offset : tensor.offset + tensor.size].view((*lead, *tensor.shape))
            for tensor in (*self.parameters, *self.buffers)
        }

    def to_config(self) -> dict[str, Any]:
        """Return the spec as plain lists and text."""
        rows = {
            kind: [[t.name, list(t.shape), t.dtype] for t in group]
            for kind, group in (("parameters", self.parameters), ("buffers", self.buffers))
        }
        return {**rows, "frozen_digest": self.frozen_digest}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Return the spec that `to_config` described."""
        offset, groups = 0, []
        for kind in ("parameters", "buffers"):
            group = []
            for name, shape, dtype in config[kind]:
                group.append(TensorSpec(name, tuple(shape), dtype, offset))
                offset += group[-1].size
            groups.append(tuple(group))
        return cls(groups[0], groups[1], config["frozen_digest"])

    def require_equal(self, other: ModelSpec, mine: str = "server", theirs: str = "client") -> None:
        """Raise SpecMismatchError, with both fingerprints and the first differing name, unless the specs are equal."""
        if self == other:
            return
        raise SpecMismatchError(
            f"the {mine}'s model {self.fingerprint} is not the {theirs}'s {other.fingerprint}: "
            f"{self._first_difference(other, mine, theirs)}; install the same task on both sides"
        )

    def _first_difference(self, other: ModelSpec, mine: str, theirs: str) -> str:
        ours, others = [*self.parameters, *self.buffers], [*other.parameters, *other.buffers]
        for a, b in zip(ours, others, strict=False):
            if a != b:
                return f"first difference at {_shown(a)} of the {mine} and {_shown(b)} of the {theirs}"
        if len(ours) != len(others):
            more, rest = (mine, ours) if len(ours) > len(others) else (theirs, others)
            return f"only the {more} has {_shown(rest[min(len(ours), len(others))])}"
        if self.frozen_digest != other.frozen_digest:
            return "names and shapes agree, but the values of the frozen parameters differ"
        return "the same tensors are parameters on one side and buffers on the other"


def _shown(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.shape} {tensor.dtype}"


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def _averaged_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = module.state_dict(keep_vars=True)
    return ((name, b) for name, b in module.named_buffers() if name in persistent and b.dtype in _FLOATS)


def _layout(tensors: Iterable[tuple[str, Tensor]], offset: int) -> tuple[TensorSpec, ...]:
    rows = []
    for name, tensor in tensors:
        rows.append(TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset))
        offset += rows[-1].size
    return tuple(rows)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _frozen_digest(module: nn.Module) -> str:
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name, parameter in frozen:
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype};".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()
