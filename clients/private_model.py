"""Which models can be trained privately by example, and the check that a way of clipping does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from clients.per_example import Clip, GradientMode, LossOf, UnsuitedError, clipped_rows, kept, trainable
from fedml_core.errors import TaskError
from fedml_core.minibatches import Batch

__all__ = ["check_mode", "check_private_model"]

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm
_EXAMPLES = 3
_TOLERANCE = 1e-3
_RECURRENT = {nn.LSTM: "DPLSTM", nn.GRU: "DPGRU", nn.RNN: "DPRNN", nn.MultiheadAttention: "DPMultiheadAttention"}


def check_private_model(module: nn.Module) -> None:
    """Check what can be seen without data.

    Raises: TaskError: if a layer lets examples influence one another (BatchNorm, frozen or not) or remembers them, if
        Opacus refuses one, or if a parameter is not float32. It says what to use instead.
    """
    for name, layer in module.named_modules():
        place = f"layer {name or 'of the model'} ({type(layer).__name__})"
        if isinstance(layer, _BATCH_NORMS) and not isinstance(layer, _INSTANCE_NORMS):
            raise TaskError(f"{place} normalises each example by the others, so nobody's gradient can be bounded; "
                            f"use torch.nn.GroupNorm({_groups(layer.num_features)}, {layer.num_features})")  # fmt: skip
        if isinstance(layer, _INSTANCE_NORMS) and layer.track_running_stats:
            raise TaskError(f"{place} keeps running statistics of examples; set track_running_stats=False")
        if any(isinstance(layer, kind) for kind in _RECURRENT) and _trains(layer):
            instead = next(name for kind, name in _RECURRENT.items() if isinstance(layer, kind))
            raise TaskError(f"{place} gives no gradients by example; use opacus.layers.{instead}, made to replace it")
    parameters = trainable(module)
    wrong = next((f"{name} is {p.dtype}" for name, p in parameters.items() if p.dtype != torch.float32), None)
    if wrong:
        raise TaskError(f"private training needs float32 parameters, and {wrong}; call .float() on the model")
    _ask_opacus(module)


def check_mode(mode: GradientMode, module: nn.Module, losses: LossOf, batch: Batch) -> None:
    """Check a way of clipping on three examples against the plainest one: autograd, example by example.

    That also finds a model or a loss that mixes examples, which no list of layers can. Dropout is off meanwhile.
    Raises: UnsuitedError: if both differ, beyond rounding.
    """
    examples = _few(batch)
    with _without_dropout(module):
        rows = [_alone(module, losses, kept(examples, torch.tensor([place], device=examples[1].device)))
                for place in range(_EXAMPLES)]  # fmt: skip
        together = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        norms = torch.stack([part.flatten(1).norm(dim=1) for part in together]).norm(dim=0)
        # Half of the shortest: every example is clipped, each by a factor of its own.
        clip = Clip(max(float(norms[norms > 0].min()) / 2 if bool((norms > 0).any()) else 1.0, 1e-12))
        expected = _joined(clipped_rows(together, clip).sums)
        with mode.attached():
            found = _joined(mode.clipped(examples, clip).sums)
    if not bool((found - expected).norm() <= _TOLERANCE * clip.norm * _EXAMPLES):
        raise UnsuitedError(
            f"{type(mode).__name__} does not give what each example gives alone: the model or the loss mixes examples; "
            "let neither compute anything over the batch"
        )


def _few(batch: Batch) -> Batch:
    count = len(batch[1])
    return kept(batch, torch.arange(_EXAMPLES, device=batch[1].device) % count)


def _alone(module: nn.Module, losses: LossOf, example: Batch) -> list[Tensor]:
    parameters = list(trainable(module).values())
    found = torch.autograd.grad(losses(example).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _joined(sums: object) -> Tensor:
    return torch.cat([part.reshape(-1) for part in sums])  # type: ignore[attr-defined]


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    layers = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _ask_opacus(module: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    before = module.training
    module.train()
    errors = ModuleValidator.validate(module, strict=False)
    module.train(before)
    if errors:
        raise TaskError(f"the model cannot be trained privately: {' '.join(str(errors[0]).split())}")


def _groups(channels: int) -> int:
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in chain(layer.parameters()))
