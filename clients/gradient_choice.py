"""Which way of taking clipped sums a model gets: the one that is named, or the fastest that gives the right sums."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from torch import nn

from clients.gradient_modes import Bookkeeping, Vmapped
from clients.opacus_modes import OpacusGhost, OpacusHooks
from clients.per_example import Clip, GradientMode, LossOf, UnsuitedError
from clients.private_model import check_mode
from fedml_core.errors import TaskError
from fedml_core.memory_layout import blames_layout
from fedml_core.minibatches import Batch

__all__ = ["choose_mode"]

_MODES: dict[str, Callable[[nn.Module, LossOf], GradientMode]] = {
    "bookkeeping": Bookkeeping,
    "ghost": OpacusGhost,
    "hooks": OpacusHooks,
    "functorch": partial(OpacusHooks, functorch=True),
    "vmap": Vmapped,
}
_PASSES = 3
_chosen: dict[tuple[str, str, bool], str] = {}


def choose_mode(
    name: str, module: nn.Module, losses: LossOf, batch: Batch, clip: Clip, *, fingerprint: str
) -> GradientMode:
    """Return the mode called `name`, checked on three examples of `batch`; for "auto", see `PrivateTraining`.

    What "auto" measured is remembered in this process for a model's `fingerprint`, its device and the kind of clipping.
    Raises: TaskError: if the mode, or for "auto" every mode, does not give each example's own gradient.
    """
    device = next(module.parameters()).device
    known = (fingerprint + str(module), str(device), clip.apart)
    wanted = _chosen.get(known, name) if name == "auto" else name
    if wanted != "auto":
        mode = _MODES[wanted](module, losses)
        flaw = _flaw(mode, module, losses, batch, clip)
        if flaw is None:
            return mode
        if name != "auto":
            raise TaskError(f"gradients {name!r} cannot be used: {flaw}")
    chosen, mode = _fastest(module, losses, batch, clip)
    _chosen[known] = chosen
    return mode


def _fastest(module: nn.Module, losses: LossOf, batch: Batch, clip: Clip) -> tuple[str, GradientMode]:
    flaws, times = [], {}
    for name, kind in _MODES.items():
        mode = kind(module, losses)
        flaw = _flaw(mode, module, losses, batch, clip)
        if flaw is not None:
            flaws.append(f"{name}: {flaw}")
        elif name == "bookkeeping":
            # Measured once and for all: nothing is faster where it works.
            return name, mode
        else:
            times[name] = _seconds(mode, batch, clip), mode
    if not times:
        raise TaskError(f"no way of clipping gives each example's own gradient; {'; '.join(dict.fromkeys(flaws))}")
    best = min(times, key=lambda name: times[name][0])
    return best, times[best][1]


def _flaw(mode: GradientMode, module: nn.Module, losses: LossOf, batch: Batch, clip: Clip) -> str | None:
    try:
        if clip.apart and isinstance(mode, OpacusGhost):
            raise UnsuitedError("ghost clipping cuts whole gradients only")
        check_mode(mode, module, losses, batch)
    except TaskError as error:
        if blames_layout(error):
            raise  # the caller may give the module another layout
        return str(error)
    return None


def _seconds(mode: GradientMode, batch: Batch, clip: Clip) -> float:
    taken = []
    with mode.attached():
        for _ in range(_PASSES):
            start = time.perf_counter()
            mode.clipped(batch, clip)
            taken.append(time.perf_counter() - start)
    return min(taken)
