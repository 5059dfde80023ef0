"""Channels-last: where a convolutional model keeps a pixel's channels side by side, which its kernels are fastest on.

A layout is the order of numbers in memory and nothing else: shapes, indices and what travels are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedml_core.errors import ConfigError
from fedml_core.named import nearest

__all__ = [
    "MemoryLayout",
    "arrange",
    "blames_layout",
    "in_channels_last",
    "ordered_gradients",
    "rearranged",
    "require_layout",
]

MemoryLayout = Literal["auto", "channels_last", "contiguous"]
"""Of a model and its 4-d inputs; "auto" is channels-last for 2-d convolutions on a CPU or a CUDA device."""

_LAYOUTS = ("auto", "channels_last", "contiguous")
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# Given a gradient in the other order, these layers' backward passes copy their large input's gradient twice.
_PICKY = (nn.Conv2d, nn.MaxPool2d)
# Of `.view` ("view size is not compatible ... contiguous subspaces") and of kernels that check what they are given.
_SIGN = "contiguous"


def require_layout(layout: MemoryLayout) -> None:
    """Refuse what is no layout.

    Raises: ConfigError: with the nearest.
    """
    if layout not in _LAYOUTS:
        raise ConfigError(
            f"memory_layout must be one of {', '.join(_LAYOUTS)}, got {layout!r}; {nearest(str(layout), _LAYOUTS)}"
        )


def in_channels_last(layout: MemoryLayout, module: nn.Module, device: torch.device) -> bool:
    """Return whether `module` on `device` is to be in channels-last; "auto" looks at nothing but these two.

    Raises: ConfigError: for any other layout.
    """
    require_layout(layout)
    if layout != "auto":
        return layout == "channels_last"
    weights = [part.weight for part in module.modules() if isinstance(part, _CONVOLUTIONS)]
    return bool(weights) and device.type in ("cpu", "cuda") and all(_alone_in_its_memory(w) for w in weights)


def arrange(module: nn.Module, *, channels_last: bool) -> None:
    """Put the weights of 2-d convolutions into channels-last, or back; values and the parameters' identity stay."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for part in module.modules():
        weight = part._parameters.get("weight") if isinstance(part, _CONVOLUTIONS) else None
        if weight is not None:
            weight.data = weight.data.contiguous(memory_format=wanted)


def rearranged(tensor: Tensor) -> Tensor:
    """Return `tensor` in channels-last where it is a batch of images: 4-d and floating point."""
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


@contextmanager
def ordered_gradients(module: nn.Module) -> Iterator[None]:
    """Hand gradients to convolutions and max-pools of `module` in channels-last, as long as the context lasts.

    What follows them, such as flattening, often returns the other order, which costs them far more than one copy here.
    """
    hooks = [part.register_forward_hook(_order_gradient) for part in module.modules() if isinstance(part, _PICKY)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def blames_layout(error: BaseException) -> bool:
    """Return whether `error`, or what caused it, may come of channels-last: code that insists on the other order."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return any(_SIGN in str(one) for one in causes)


def _order_gradient(_: nn.Module, __: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad and output.dim() == 4:
        output.register_hook(rearranged)


def _alone_in_its_memory(weight: Tensor) -> bool:
    """Return whether nobody else can look into the tensor's memory and find another order there."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
