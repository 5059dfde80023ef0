"""Private training by itself: whether an example's gradient is cut, whether the noise is there, who is in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.per_example import AdaptiveClipping
from fedml_core.data import Examples
from fedml_core.errors import FedveilError
from fedml_core.privacy.goodness import SizeTest, adds_up_p, even_p, spread_p
from fedml_core.randomness import seeded
from fedml_core.task import Task
from simulations.audit.cohorts import judge_poisson
from simulations.audit.example_site import ExampleSite, Probe, weighing_nothing
from simulations.audit.findings import REJECT, Finding, Verdict
from simulations.audit.mechanism import Residuals, draws_for, judge_noise

__all__ = ["check_batches", "check_example_clipping", "check_example_noise", "linear_task"]

_WEIGHTS = (1e-3, 1.0, 1e3, 1e6, 1e30)
"""By which examples' losses are multiplied: short gradients, long ones, and one that float32 cannot hold."""
_COPIES, _COPIES_BYTES = 256.0, 1 << 26
_SURE = 6.0  # standard deviations: once in a billion
_STEPS = 4
_LOUD = 1e6  # a gradient over the clip norm: it is cut to the norm exactly
_INWARDS = 5e-4  # of the clip norm, by which a gradient may be cut further
_BATCHES, _MEMBERS, _MOST_MEMBERS = 200, 40, 20_000


def check_example_clipping(site: ExampleSite) -> Finding:
    """Return whether an example moves a step by no more than the noise relies on, whatever its gradient's length.

    Many copies of one example stand in for it: what they add together is far above the noise.
    """
    what, private = "example clipping", site.private
    probe, alone = site.probe(), site.data.take([0])
    bytes_each = sum(tensor.element_size() * tensor.numel() for tensor in (*alone.inputs, alone.targets))
    wanted = math.ceil(_COPIES * max(1.0, private.noise_multiplier) / private.sampling_rate)
    copies = max(1, min(wanted, _COPIES_BYTES // max(1, bytes_each)))
    found = {}
    try:
        for weight in _WEIGHTS:
            repeated = alone.take(torch.zeros(copies, dtype=torch.long))
            weighted = Examples(repeated.inputs, repeated.targets, torch.full((copies,), weight))
            found[weight] = probe.squared(weighted)
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a private training failed on examples of an unusual size: {error}")
    many = copies * private.sampling_rate
    most = many + _SURE * math.sqrt(many * (1 - private.sampling_rate)) + _SURE
    noise = (private.gradient_noise / private.noise_multiplier) ** 2 * 1.02  # a grid may add 1 % to its deviation
    quiet = noise * (probe.size + _SURE * math.sqrt(2 * probe.size) + _SURE**2)
    allowed = (most / private.noise_multiplier + _SURE * math.sqrt(noise)) ** 2 + quiet
    # What one example adds at least, in units of the clip norm, if as many came as were expected.
    longest = max(math.sqrt(max(0.0, one - quiet)) for one in found.values()) * private.noise_multiplier / many
    numbers = {"clip_norm": private.clipping.clip_norm, "longest_over_clip_norm": longest, "copies": copies}
    if max(found.values()) > allowed:
        said = f"an example moves a step by {longest:.3g} times the clip norm of {private.clipping.clip_norm:g}"
        return Finding(what, Verdict.FAIL, f"{said}, by which the noise is scaled", numbers)
    said = f"no example moves a step by more than the clip norm of {private.clipping.clip_norm:g}, whatever its weight"
    return Finding(what, Verdict.PASS, said, numbers)


def check_example_noise(site: ExampleSite) -> tuple[Finding, Residuals | None]:
    """Return whether steps on nothing release the noise that the account is told of: scale, shape, repetition."""
    what, probe, nothing = "example noise", site.probe(), weighing_nothing(site.data)
    draws = draws_for(probe.size)
    try:
        measured = np.stack([probe.released(nothing) for _ in range(draws)])
        # Where the clip norm moves from step to step, so does the noise, and sums of it say nothing.
        steady = not isinstance(site.private.clipping, AdaptiveClipping)
        several = np.stack([probe.released(nothing, _STEPS) for _ in range(draws)]) if steady else None
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a private training on nothing failed: {error}"), None
    found = Residuals(measured, seeded(site.seed, "reference noise").standard_normal(measured.shape))
    loud = several is not None and measured.any() and several.any()
    more = {"several": adds_up_p(measured, several, _STEPS)} if loud and several is not None else None
    return judge_noise(what, found, more=more), found


def check_batches(site: ExampleSite) -> tuple[Finding, SizeTest | None]:
    """Return whether batches are those of Poisson sampling, by examples that tell when they are loaded.

    An engine may load a client whole; then batches are counted by what many examples add up to, and have no histogram.
    """
    what, rate = "example sampling", site.private.sampling_rate
    if site.engine:
        return _counted(site), None
    members = min(_MOST_MEMBERS, max(64, math.ceil(_MEMBERS / rate)))
    telling = _Telling(members)
    probe = site.probe(linear_task(1))
    try:
        probe.released(telling)  # the first training also tries ways of clipping out
        batches = [telling.loaded(probe, 1) for _ in range(_BATCHES)]
        steps = max(2, min(50, round(2 / rate)))
        trainings = [telling.loaded(probe, steps) for _ in range(max(4, 3 * _BATCHES // steps))]
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a private training failed: {error}"), None
    more = {}
    if rate < 1:
        came = np.bincount(np.concatenate(trainings).astype(np.int64), minlength=members)
        more["dealt"] = even_p(came, len(trainings) * steps, rate)
    sets = [sorted(set(batch)) for batch in batches]
    return judge_poisson(what, sets, members, rate, who=("batch", "examples"), more=more)


def _counted(site: ExampleSite) -> Finding:
    """Return whether steps on two groups of equal examples hold as many of each as coins let them."""
    what, rate, noise = "example sampling", site.private.sampling_rate, site.private.noise_multiplier
    # So many that the coins are ten times as loud as the noise; without coins, a few.
    wanted = max(100 * noise**2 / (rate * (1 - rate)), 100 / rate) if rate < 1 else 64.0
    members = min(_MOST_MEMBERS, math.ceil(wanted))
    groups = torch.eye(2).repeat_interleave(members, dim=0) * _LOUD * site.private.clipping.clip_norm
    data = Examples.of(groups, torch.zeros(2 * members))
    probe, excess = site.probe(linear_task(2)), (site.private.gradient_noise / noise) ** 2
    try:
        singles = np.stack([probe.released(data) for _ in range(_BATCHES)]) * noise
        steps = max(2, min(50, round(2 / rate)))
        steady = rate < 1 and not isinstance(site.private.clipping, AdaptiveClipping)
        several = [probe.released(data, steps) for _ in range(_BATCHES // 4)] if steady else []
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a private training failed: {error}")
    one = members * rate * (1 - rate) + excess * noise**2
    parts = {
        "sizes": _count_p(singles.sum(axis=1), 2 * members * rate, 2 * one),
        "groups": spread_p(singles[:, 0] - singles[:, 1], 0.0, 2 * one),
    }
    if several:
        parts["dealt"] = _count_p(np.stack(several) * noise, steps * members * rate, steps * one)
    p_value = min(1.0, len(parts) * min(parts.values()))
    numbers = {"claimed": "poisson", "rate": rate, "p_value": p_value, "p_values": parts, "members": 2 * members}
    if p_value < REJECT:
        said = {
            "sizes": "batch sizes are not Binomial",
            "groups": "one half of the examples does not come as the other does",
            "dealt": "within a training examples come as if they were dealt out in turn",
        }[min(parts, key=lambda name: parts[name])]
        return Finding(what, Verdict.FAIL, f"Poisson sampling is claimed, and {said} (p = {p_value:.2g})", numbers)
    said = f"batches count as those of Poisson sampling at rate {rate:g} do (p = {p_value:.2g})"
    return Finding(what, Verdict.PASS, said, numbers)


def _count_p(counts: NDArray[np.float64], expected: float, variance: float) -> float:
    """Return whether sums of gradients are those of so many examples, each cut to the clip norm or a little below."""
    found = float(counts.mean())
    return spread_p(counts, min(expected, max(found, expected * (1 - _INWARDS))), variance)


def linear_task(size: int) -> Task:
    """Return a task whose examples' gradients are less their inputs, whatever the model; of `size` parameters."""

    def model() -> nn.Module:
        return nn.Linear(size, 1, bias=False)

    return Task(model=model, loss=_minus_output)


def _minus_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return -outputs.squeeze(1)


@dataclass
class _Telling:
    """A data set that notes which of its examples are read, in order."""

    count: int
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many examples there are."""
        return self.count

    def __getitem__(self, index: int, /) -> Any:
        """Return an example, and note it."""
        if not self.read or self.read[-1] != index:  # a batch may be filled up with copies of its last example
            self.read.append(int(index))
        return torch.ones(1), torch.zeros(())

    def loaded(self, probe: Probe, steps: int) -> Sequence[int]:
        """Return what a training of so many steps reads."""
        self.read.clear()
        probe.released(self, steps)
        return list(self.read)
