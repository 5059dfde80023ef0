"""Canary examples: each is at the audited site if its coin says so, and what the site releases tells which were.

Gradient canaries are the strongest attack that there is on the mechanism: examples of a linear model whose gradients
are long, constant and orthogonal, so that each has a coordinate of every release to itself, and nothing but the noise
hides it. Mislabelled examples are an attack from outside: real inputs with wrong targets, in the site's own training,
told by how far the finished model's loss at them fell.
Source: Steinke, Nasr and Jagielski (2023), arXiv:2305.08846, sections 6 and 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.data import Examples
from fedml_core.errors import FedveilError, PrivacyError
from fedml_core.privacy.accounting import Claim
from fedml_core.privacy.auditing import Estimate, compared_estimate, one_run_bound
from fedml_core.randomness import keyed_coins, seeded
from simulations.audit.canaries import Scores
from simulations.audit.example_mechanism import linear_task
from simulations.audit.example_site import ExampleSite
from simulations.audit.findings import Finding, Verdict

__all__ = ["Attacked", "attack_gradients", "attack_labels"]

_LOUD = 1e6  # a canary's gradient over the clip norm: clipping must show that it is there
_MOST_TRAININGS, _MOST_STEPS = 300, 3_000
_TOO_WEAK = 0.1  # of the claimed epsilon
_SURE = 3.09
"""Deviations, 99.9 %: these canaries hide nothing of one another, so unlike clients' nothing errs downwards, and at
95 % every twentieth honest site without sampling would fail.
"""
_BATCH = 256
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Attacked:
    """One attack. `scores`: of canaries at the site and of others. `claim`: about the steps that were attacked."""

    finding: Finding
    scores: tuple[Floats, Floats] = field(repr=False)
    estimate: Estimate
    bound: float
    claim: Claim


def attack_gradients(site: ExampleSite, canaries: int) -> Attacked | Finding:
    """Return what gradient canaries tell, in as many of the site's steps as an audit has time for."""
    what, private = "example canaries", site.private
    included = coins(site.seed, "gradient canaries", canaries)
    places = np.flatnonzero(included)
    inputs = torch.zeros(len(places), canaries)
    inputs[torch.arange(len(places)), torch.from_numpy(places)] = _LOUD * private.clipping.clip_norm
    data = Examples.of(inputs, torch.zeros(len(places)))
    trainings, each = _plan(site)
    try:
        probe = site.probe(linear_task(canaries))
        releases = np.stack([probe.released(data, each) for _ in range(trainings)])
    except FedveilError as error:
        return Finding(what, Verdict.FAIL, f"a private training of canaries failed: {error}")
    # In units of what most coordinates show, which is noise; no coin has a say in it.
    releases /= np.maximum(np.median(np.abs(releases), axis=1, keepdims=True) / 0.6745, 1e-12)
    scores = Scores(releases, releases.sum(axis=0), releases.sum(axis=0))
    rate = private.sampling_rate
    shift, seldom = (1.0, rate) if each == 1 else (rate * each**0.5, 1.0)
    ratios = scores.likelihood(shift / private.noise_multiplier, seldom)
    return _judged(what, site, (scores.every, ratios), included, trainings * each)


def attack_labels(
    site: ExampleSite, pool: Examples, canaries: int, tell: Callable[[str], object]
) -> Attacked | Finding:
    """Return what mislabelled examples tell, by the loss of the site's own model after all of its rounds.

    The server sends back what the site made of its model, which is what a server that attacks would do.
    Args: pool: whose inputs are used, with targets of others.
    """
    what = "mislabelled examples"
    wrong = _mislabelled(site, pool, canaries)
    if wrong is None:
        return Finding(what, Verdict.INFO, "the task has too few examples, or one target only, so none can be wrong")
    included = coins(site.seed, "mislabelled", len(wrong))
    own = site.data
    here = wrong.take(np.flatnonzero(included).tolist())
    both = Examples(
        tuple(torch.cat(pair) for pair in zip(own.inputs, here.inputs, strict=True)),
        torch.cat([own.targets, here.targets]),
    )
    rounds = max(1, min(site.rounds, _MOST_STEPS // site.private.steps(site.training)))
    try:
        trainer = site.make(site.task, site.account)
        start = parameters = trainer.initial()
        for number in range(1, rounds + 1):
            tell(f"mislabelled examples: round {number} of {rounds}")
            parameters = parameters + site.train(trainer, parameters, both, site.training, number)
        fell = _losses(site, start, wrong) - _losses(site, parameters, wrong)
    except FedveilError as error:
        return Finding(what, Verdict.WARN, f"the audited site could not train on them: {error}")
    if not np.isfinite(fell).all():
        return Finding(what, Verdict.WARN, "the audited site's training diverged; lower the learning rate")
    steps = rounds * site.private.steps(site.training)
    return _judged(what, site, (fell, fell), included, steps, bound_only=True)


def coins(seed: int, what: str, count: int) -> NDArray[np.bool_]:
    """Return who is included, (count,): a fair coin each, all of them tossed again if fewer than two fall alike."""
    for toss in itertools.count():
        fallen = keyed_coins((seed, what, toss), np.arange(count)) < 0.5
        if 2 <= int(fallen.sum()) <= count - 2:
            break
    return fallen


def _plan(site: ExampleSite) -> tuple[int, int]:
    """Return how many trainings are attacked, and of how many steps each: step by step where there are few."""
    if site.steps <= _MOST_TRAININGS:
        return site.steps, 1
    each = min(site.private.steps(site.training), _MOST_STEPS)
    return max(1, min(site.rounds, _MOST_TRAININGS, _MOST_STEPS // each)), each


def _judged(
    what: str,
    site: ExampleSite,
    scores: tuple[Floats, Floats],
    included: NDArray[np.bool_],
    steps: int,
    *,
    bound_only: bool = False,
) -> Attacked | Finding:
    """Return the attack by its scores: those that are averaged, and those that are guessed by."""
    averaged, guessed = scores
    try:
        estimate = compared_estimate(averaged[included], averaged[~included], site.delta)
    except PrivacyError as error:
        if bound_only:
            return Finding(what, Verdict.WARN, f"the model says the same of all of them: {error}")
        return Finding(what, Verdict.FAIL, "canaries that are not at the site leave no noise in what it releases")
    proved = one_run_bound(guessed[included], guessed[~included], delta=site.delta)
    bound, claim = proved[0], site.claim(steps)
    lower = bound if bound_only else max(bound, estimate.epsilon - _SURE * estimate.sd)
    verdict = Verdict.FAIL if lower > claim.epsilon else Verdict.PASS
    estimated = f"canaries estimate epsilon {estimate.epsilon:.3g} +- {estimate.sd:.2g}, and"
    said = f"{f'{len(included)} of them' if bound_only else estimated} prove epsilon {bound:.3g} at 95 %"
    said = f"{said}; claimed is {claim.epsilon:.3g}"
    if steps < site.steps:
        said = f"{said} for the {steps} of {site.steps} steps that were attacked"
    if verdict is Verdict.PASS and not bound_only and estimate.epsilon < _TOO_WEAK * claim.epsilon:
        verdict, said = Verdict.WARN, f"{said}; too weak an audit"
    numbers = {"claimed": claim.epsilon, "steps": steps, "steps_of_the_run": site.steps}
    finding = Finding(what, verdict, said, {**numbers, **_numbers(estimate, proved, included)})
    return Attacked(finding, (averaged[included], averaged[~included]), estimate, bound, claim)


def _numbers(estimate: Estimate, proved: tuple[float, int, int], included: NDArray[np.bool_]) -> dict[str, Any]:
    """Return what the attack found, by the names of a finding's numbers."""
    bound, guesses, correct = proved
    return {
        "estimate": estimate.epsilon,
        "estimate_sd": estimate.sd,
        "estimate_lower_999": max(0.0, estimate.epsilon - _SURE * estimate.sd),
        "one_run_bound_95": bound,
        "one_run_guesses": guesses,
        "one_run_correct": correct,
        "canaries": len(included),
        "canaries_included": int(included.sum()),
    }


def _mislabelled(site: ExampleSite, pool: Examples, canaries: int) -> Examples | None:
    """Return examples of the pool with targets that others have."""
    count = min(canaries, len(pool))
    if count < 8:
        return None
    draws = seeded(site.seed, "mislabelled")
    chosen = draws.choice(len(pool), count, replace=False)
    picked = pool.take(chosen.tolist())
    classes = site.task.classes
    if classes is not None:
        if classes < 2 or picked.targets.dim() != 1:
            return None
        moved = torch.from_numpy(draws.integers(1, classes, count))
        return Examples(picked.inputs, (picked.targets + moved.to(picked.targets.dtype)) % classes)
    others = pool.targets[torch.from_numpy((chosen + draws.integers(1, len(pool), count)) % len(pool))]
    return None if bool((others == picked.targets).all()) else Examples(picked.inputs, others)


def _losses(site: ExampleSite, parameters: Tensor, data: Examples) -> Floats:
    """Return the loss of a model at each example."""
    trainer = site.make(site.task, site.account)
    module = site.task.build(site.seed)
    trainer.spec.load(parameters, module)
    module.eval()
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(data)).split(_BATCH):
            part = data.take(rows)
            found.append(site.task.loss(module(*part.inputs), part.targets).double())
    return np.asarray(torch.cat(found).numpy())
