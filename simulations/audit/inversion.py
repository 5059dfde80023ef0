"""Gradient inversion: training examples out of what a server saw of them.

A dense first layer hands its inputs out: row i of its weight's gradient is x times the gradient of bias i (exact for
one example, and for every unit that one example alone activates). Where several are mixed, an optimiser looks for
inputs whose gradient points where the update does.
Source: Zhu et al. (2019), arXiv:1906.08935; Zhao et al. (2020), arXiv:2001.02610; Geiping et al. (2020),
arXiv:2003.14053.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedml_core.devices import fitting_threads, seeded_torch
from fedml_core.model import ModelSpec
from fedml_core.randomness import torch_generator

__all__ = ["Attack", "first_dense", "from_agreeing_rows", "from_largest_row", "from_optimisation", "label_of", "psnr"]

_AGREE = 1e-3
_MOST_OPTIMISED = 200_000  # parameters; beyond it the search takes more than seconds
_EXACT_DB = 120.0
"""The most that a PSNR is said to be; float32 has no more."""


@dataclass(frozen=True)
class Attack:
    """What one attack made of one view. `name`: of the attack. `psnr_db`: of the best match to a true input, at most
    120. `relative_error`: of that match. `recovered`: it, and `truth`: the input.
    """

    name: str
    psnr_db: float
    relative_error: float
    recovered: Tensor = field(repr=False)
    truth: Tensor = field(repr=False)

    @classmethod
    def best(cls, name: str, found: Tensor, inputs: Tensor, peak: float) -> Attack | None:
        """Return the closest of the candidates to any of the inputs, or None without a finite candidate.

        Args: found: (K, p). inputs: (n, p). peak: the largest less the smallest value that an input can have.
        """
        found = found.double()
        found = found[torch.isfinite(found).all(dim=1)]
        if not len(found):
            return None
        distances = torch.cdist(found, inputs.double())
        place = int(distances.argmin())
        row, target = divmod(place, len(inputs))
        error, truth = float(distances[row, target]), inputs[target].double()
        relative = error / max(float(truth.norm()), 1e-12)
        return cls(name, psnr(found[row], truth, peak), relative, found[row].float(), inputs[target])


def psnr(found: Tensor, truth: Tensor, peak: float) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 120.

    Example:
        >>> psnr(torch.zeros(4), torch.full((4,), 0.1), 1.0)
        20.0
    """
    error = float(((found.double() - truth.double()) ** 2).mean())
    return _EXACT_DB if error <= 0 else round(min(_EXACT_DB, 20 * math.log10(peak) - 10 * math.log10(error)), 6)


def first_dense(module: nn.Module, spec: ModelSpec) -> tuple[str, str] | None:
    """Return the names of weight and bias of the model's first layer with parameters, if it is dense and has both."""
    for name, layer in module.named_modules():
        if not any(True for _ in layer.parameters(recurse=False)):
            continue
        prefix = f"{name}." if name else ""
        known = {tensor.name for tensor in spec.parameters}
        dense = isinstance(layer, nn.Linear) and {f"{prefix}weight", f"{prefix}bias"} <= known
        return (f"{prefix}weight", f"{prefix}bias") if dense else None
    return None


def from_largest_row(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the input that the unit with the largest bias gradient tells, (1, p); exact for a batch of one.

    Args: weight: (units, p), bias: (units,), both of an update or a gradient: its scale does not matter.
    """
    unit = int(bias.abs().argmax())
    return (weight[unit].double() / bias[unit].double()).unsqueeze(0)


def from_agreeing_rows(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the inputs that two units or more tell alike, (K, p): what one example alone has activated.

    A unit that several examples activate tells a mixture that no other unit tells, so an attacker knows the real ones.
    """
    told = bias.double().abs() > 1e-9 * float(bias.double().abs().max())
    rows = weight.double()[told] / bias.double()[told].unsqueeze(1)
    if len(rows) < 2:
        return rows[:0]
    distances = torch.cdist(rows, rows) / rows.norm(dim=1).clamp_min(1e-12)
    distances.fill_diagonal_(math.inf)
    nearest = distances.min(dim=1).values
    return rows[nearest < _AGREE]


def label_of(bias: Tensor) -> int:
    """Return the label of a batch of one: the only logit whose bias an update under cross-entropy raises.

    Args: bias: (classes,), of an update, which descends; a gradient has the other sign.
    """
    return int(bias.argmax())


def from_optimisation(
    module: nn.Module,
    update: Tensor,
    labels: Tensor,
    shape: Sequence[int],
    *,
    within: tuple[float, float],
    steps: int,
    seed: int,
) -> Tensor | None:
    """Return inputs (n, p) whose gradient points along the update, or None for a model too large to search.

    Args: module: with the parameters that the update began from; it is left as it was. update: over the trainable
        parameters, to ADD. labels: (n,), known or guessed. within: the range of inputs. steps: of Adam.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if sum(parameter.numel() for parameter in parameters) > _MOST_OPTIMISED or not bool(update.any()):
        return None
    low, high = within
    generator = torch_generator(seed, "inversion")
    start = torch.rand((len(labels), *shape), generator=generator) * (high - low) + low
    guess = start.clone().requires_grad_(True)
    wanted = -update.float() / update.float().norm()
    optimiser = torch.optim.Adam([guess], lr=0.05 * (high - low))
    module.eval()
    with seeded_torch(seed, guess.device, fitting_threads(module)):  # threads that wait for each other cost most of it
        for _ in range(steps):
            loss = F.cross_entropy(module(guess), labels)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            away = 1 - (flat @ wanted) / flat.norm().clamp_min(1e-12)
            (guess.grad,) = torch.autograd.grad(away, [guess])
            optimiser.step()
            with torch.no_grad():
                guess.clamp_(low, high)
    return guess.detach().reshape(len(labels), -1)


def chance_db(pool: Tensor, inputs: Tensor, peak: float) -> float:
    """Return the PSNR of whoever guesses the mean input, at the input that suits it best."""
    return max(psnr(pool.double().mean(dim=0), row, peak) for row in inputs)


def as_rows(tensor: Tensor) -> Tensor:
    """Return examples as rows, (n, p)."""
    return tensor.detach().reshape(len(tensor), -1)


def finite(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    """Return an array as a float32 tensor; what float32 cannot hold is infinite, and no attack uses it."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(values.astype(np.float32))
