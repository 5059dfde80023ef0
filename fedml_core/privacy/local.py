"""Local differential privacy: every client noises its own update, and trusts nobody.

The noise is for replacing the whole update by any other one, so for a distance of twice the clip norm. It is calibrated
by `fedml_core.privacy.analytic` (Balle and Wang 2018, arXiv:1805.06530), which holds for every epsilon; textbooks'
sqrt(2 ln(1.25 / delta)) / epsilon does not hold above 1.

Guarantees: what leaves the client is its clipped update plus noise from fresh entropy, and no other number about it.
Trust: nobody but the client itself; the server and everybody else see the noised update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedml_core.checks import require_number
from fedml_core.privacy.clipping import clipped
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.privacy.lattice import Lattice
from fedml_core.transform import Draws, State, Transform
from fedml_core.update import Update

__all__ = ["LocalGaussian"]


@dataclass(frozen=True)
class LocalGaussian(Transform):
    """Clips an update, adds Gaussian noise to each coordinate, and takes off its weight and what it reports.

    Guarantees: decode(sum(encode(u_i))) is the sum of the clipped updates plus noise of standard deviation
        noise_multiplier x clip_norm x sqrt(n) on every coordinate, up to 1 %.
    Guarantees: an update that is not finite becomes NaN as a whole, which no sum accepts.
    Args: clip_norm: > 0, in parameter units. noise_multiplier: > 0, the noise's standard deviation over clip_norm; half
        of it is over the distance of two clipped updates.
    """

    clip_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_number("clip_norm", self.clip_norm, at_least=1e-12, at_most=1e12)
        require_number("noise_multiplier", self.noise_multiplier, above=0)

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        """Return the noised update alone; `draws`, which the server can reproduce, are not used."""
        short, _ = clipped(update.values, self.clip_norm)
        size = short.shape[-1]
        lattice, stream = Lattice.of(self.noise_multiplier, self.clip_norm, size), NoiseStream.fresh()
        rows = [_noised(row, lattice, stream) for row in short.reshape(-1, size)]
        values = torch.stack(rows).reshape(short.shape) if rows else short
        return Update(values, torch.ones_like(update.weight), {}, update.facts), memory

    def event(self) -> Mapping[str, Any]:
        """Return the Gaussian mechanism on one client's update."""
        return {"name": "analytic-gaussian-local", "noise_multiplier": float(self.noise_multiplier)}


def _noised(row: Tensor, lattice: Lattice, stream: NoiseStream) -> Tensor:
    return row if bool(row.isnan().any()) else lattice.noised(row, stream)
