"""A sample of every transform, with what its docstring promises of one round: add a line here for each new one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.control_variates import ControlVariates
from fedml_core.model import ModelSpec
from fedml_core.privacy.adaptive_clip import ClipByQuantile
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.correlated import BandedNoise, ServerBanded, ServerTree, TreeNoise
from fedml_core.privacy.distributed_noise import DistributedNoise
from fedml_core.privacy.gaussian import ServerGaussian
from fedml_core.privacy.local import LocalGaussian
from fedml_core.proximal import Proximal
from fedml_core.transform import Chain, Guide, State, Transform, chain
from fedml_core.update import Total, Update
from fedml_core.weighting import ByExamples, ByMetric, Uniform, Weigh
from fedml_core.wire import from_frame, to_frame
from strategies.server_optimizers import ServerAdagrad, ServerAdam, ServerMomentum, ServerStep, ServerYogi

SPEC = ModelSpec.of(torch.nn.BatchNorm1d(3))
"""Six trainable parameters, then six averaged buffers."""

Promise = Callable[[Tensor, Tensor], Tensor]
"""From the clients' updates (n, d) and numbers of examples (n,), in float64, to the step (d,) of the first round."""


@dataclass(frozen=True)
class Case:
    """A transform; the step that it promises; and how far off it may be, for updates of magnitude 1 and n clients.

    `reproducible`: its draws come from keys, so that equal arguments give equal results; privacy noise does not.
    """

    transform: Transform
    promised: Promise
    tolerance: Callable[[int], float] = lambda clients: 4e-6 * clients
    reproducible: bool = True


def total(values: Tensor, examples: Tensor) -> Tensor:
    return values.sum(dim=0)


def mean(values: Tensor, examples: Tensor) -> Tensor:
    return values.mean(dim=0)


def weighted_mean(values: Tensor, examples: Tensor) -> Tensor:
    return (values * examples[:, None]).sum(dim=0) / examples.sum()


def largest_two(values: Tensor, examples: Tensor) -> Tensor:
    """Return the sum of each client's two largest parameters, and of all buffers."""
    kept = values.clone()
    for row in kept:
        # Python's sort is stable: of equal magnitudes the first are kept.
        row[sorted(range(6), key=lambda place: -abs(row[place]))[2:]] = 0
    return kept.sum(dim=0)


def for_parameters(step: Callable[[Tensor], Tensor], of: Promise = total) -> Promise:
    """Return the promise to apply `step` to the parameters' part of a promise and to leave the buffers' part."""

    def promised(values: Tensor, examples: Tensor) -> Tensor:
        before = of(values, examples)
        return torch.cat([step(before[:6]), before[6:]])

    return promised


def each_clipped(values: Tensor, examples: Tensor) -> Tensor:
    """Return the sum of the updates, each scaled down to a norm of at most 1."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return (values / norms.clamp(min=1.0)).sum(dim=0)


def adam(delta: Tensor) -> Tensor:
    """Return Adam's first step with the defaults: both corrections have the exponent 2."""
    rate = 0.1 * math.sqrt(1 - 0.99**2) / (1 - 0.9**2)
    return rate * 0.1 * delta / ((0.01 * delta**2).sqrt() + 1e-3)


CASES: dict[str, list[Case]] = {
    "Chain": [
        Case(Chain(), total),
        Case(chain(ServerStep(0.5), Proximal(0.1), Weigh(Uniform())), for_parameters(lambda d: 0.5 * d, mean)),
        Case(chain(ServerAdam(), ControlVariates(50), Weigh(Uniform())), for_parameters(adam, mean)),
        Case(chain(Weigh(ByExamples()), TopK(1.0)), weighted_mean),
    ],
    "Weigh": [
        Case(Weigh(Uniform()), mean),
        Case(Weigh(ByExamples()), weighted_mean),
        Case(Weigh(ByMetric("examples", power=0.0)), mean),
    ],
    "Proximal": [Case(Proximal(0.1), total)],
    # Without Weigh to the right of it, what ControlVariates takes for the mean is the sum.
    "ControlVariates": [Case(ControlVariates(population=50), total)],
    "TopK": [Case(TopK(1 / 3), largest_two), Case(TopK(1.0), total)],
    "StochasticQuantize": [Case(StochasticQuantize(8), total, lambda clients: clients / 127 + 1e-5)],
    "ClipByNorm": [Case(ClipByNorm(1.0), each_clipped), Case(ClipByNorm(10.0), total)],
    "ClipByQuantile": [Case(ClipByQuantile(1.0, 0.5, 0.2, 0.1, 4.0), each_clipped)],
    # Noise that single precision hardly sees: what the rest of it does is what the laws are about.
    "ServerGaussian": [Case(ServerGaussian(1e-7, 4.0, bound=1.0), total, reproducible=False)],
    "ServerTree": [Case(ServerTree(1e-7, 4.0, TreeNoise(rounds=9), bound=1.0), total, reproducible=False)],
    "ServerBanded": [
        Case(ServerBanded(1e-7, 4.0, BandedNoise(rounds=9, bands=3), bound=1.0), total, reproducible=False)
    ],
    "DistributedNoise": [Case(DistributedNoise(1.0, SPEC.size, 4, 2, bound=1.0), total)],
    "LocalGaussian": [Case(LocalGaussian(1.0, 1e-8), each_clipped, reproducible=False)],
    "ServerStep": [Case(ServerStep(0.25), for_parameters(lambda d: 0.25 * d))],
    "ServerMomentum": [Case(ServerMomentum(0.5, momentum=0.9), for_parameters(lambda d: 0.5 * d))],
    "ServerAdagrad": [Case(ServerAdagrad(), for_parameters(lambda d: 0.1 * d / (d.abs() + 1e-3)))],
    "ServerAdam": [Case(ServerAdam(), for_parameters(adam))],
    "ServerYogi": [Case(ServerYogi(), for_parameters(lambda d: 0.01 * 0.1 * d / (0.1 * d.abs() + 1e-3)))],
}


def equal(a: Any, b: Any) -> bool:
    """Say whether two trees, updates, totals or guides are equal, leaf by leaf."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, Update | Total | Guide):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return type(a) is type(b) and bool(a == b)


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [tree] if isinstance(tree, Tensor) else []


def stacked(trees: Sequence[Any]) -> Any:
    if isinstance(trees[0], Mapping):
        return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}
    return torch.stack(list(trees)) if isinstance(trees[0], Tensor) else trees[0]


def restored(tree: State) -> State:
    return from_frame(to_frame("state", tree))
