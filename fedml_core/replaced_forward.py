"""Other forward passes for some layers of a module, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["has_forward_of", "replaced_forwards"]


def has_forward_of(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether `layer` computes what `kind` does: a subclass or an instance with its own forward does not."""
    return type(layer).forward is kind.forward and "forward" not in vars(layer)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let each layer compute what it is mapped to; hooks run as ever. Layers must not have a forward of their own.

    Guarantees: on leaving, also by an exception, every layer is as it was.
    """
    for layer, forward in forwards.items():
        vars(layer)["forward"] = forward
    try:
        yield
    finally:
        for layer in forwards:
            del vars(layer)["forward"]
