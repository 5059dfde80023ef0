"""An audit as one value: the run is done with canaries in it, and everything that it claims is put to the test."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.checks import require_whole
from fedml_core.errors import ConfigError
from fedml_core.privacy.auditing import Estimate, canary_estimate, one_run_bound
from fedml_core.privacy.goodness import SizeTest
from fedml_core.update import Update
from server.checkpoint import RunState
from server.plan import EvaluationPlan
from server.record import Callback
from server.round import RoundReport
from simulations.audit.canaries import Canaries, FirstClients, Scores, Watched, with_canaries
from simulations.audit.cohorts import check_sampling, rate_of
from simulations.audit.configured import most_at_once, multiplier_of, without_masks
from simulations.audit.disclosure import Case, check_disclosure
from simulations.audit.findings import Finding, Verdict, overall
from simulations.audit.judging import judge_canaries, judge_transcripts
from simulations.audit.mechanism import Residuals, check_bound, check_noise
from simulations.audit.shadows import Membership, infer_membership
from simulations.baseline import passes_of
from simulations.faults import Faults
from simulations.simulate import Simulation

__all__ = ["Audit", "Audited"]

_LOUD = 10.0
"""How many times longer than the bound a canary's update is: clipping must show that it is there."""
_MOST_PASSES = 30
_DELTA = 1e-5  # where no delta is claimed


@dataclass(frozen=True)
class Audited:
    """What an audit found. `claim`: the run's own, or None. `pictures`: what its pictures are drawn from."""

    protection: str
    claim: Mapping[str, Any] | None
    findings: Sequence[Finding]
    facts: Mapping[str, Any]
    scores: tuple[NDArray[np.float64], NDArray[np.float64]] = field(repr=False)
    estimate: Estimate
    bound: float
    residuals: Residuals | None = field(default=None, repr=False)
    sizes: SizeTest | None = field(default=None, repr=False)
    cases: Sequence[Case] = field(default=(), repr=False)
    membership: Membership | None = field(default=None, repr=False)

    @property
    def verdict(self) -> Verdict:
        """Return the worst of the findings."""
        return overall(self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "verdict": str(self.verdict),
            "protection": self.protection,
            "claim": self.claim,
            **self.facts,
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit of one simulated run.

    Args: simulation: the run; its simulated faults and its fleet are left out. canaries: how many coins are tossed;
        about half of them take part. None for an eighth of the model's parameters, 16 to 1,000, and at most 64 where
        no privacy is claimed. shadows: models for membership inference, 0 for none. search_steps: of the search for
        inputs in gradient inversion. seed: of directions, coins and shadows; None draws a fresh one.
    Raises: ConfigError: if a number is out of range.
    """

    simulation: Simulation
    canaries: int | None = None
    shadows: int = 16
    search_steps: int = 300
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.canaries is not None:
            require_whole("canaries", self.canaries, at_least=8, at_most=100_000)
        require_whole("search_steps", self.search_steps, at_least=1)
        require_whole("shadows", self.shadows, at_least=0, at_most=256)
        if self.shadows == 1:
            raise ConfigError("shadows must be 0 or at least 2, got 1: each example is left out by half of them")

    def run(self, out: Path, callbacks: Sequence[Callback] = ()) -> Audited:
        """Run the federation with canaries into the folder `out` / "run", and every test beside it.

        Args: callbacks: called after each round.
        Raises: FedveilError: if the run itself cannot be done.
        """
        watched, strategy, spec = self._watched, self.simulation.strategy, self.simulation.trainer.spec
        live = _Live(watched.canaries, self.simulation.trainer.initial())
        run = self._with_canaries(watched)
        history = run.run(out=out / "run", overwrite=True, callbacks=[live, *callbacks])
        claim = history.reports[-1].privacy
        seed = self._seed
        noise, residuals = check_noise(strategy, spec, self.simulation.trainer.initial(), seed)
        observed = [report.cohort for report in history.reports]
        sampling, sizes = check_sampling(run.sampling, len(watched), observed, seed)
        canaries, scores, estimate, bound = self._canaries(live, history.reports, claim)
        epsilon = None if claim is None else float(claim["epsilon"])
        disclosure, cases = check_disclosure(
            self.simulation.task,
            strategy,
            self.simulation.trainer,
            self.simulation.population,
            self.simulation.training,
            epsilon=epsilon,
            seed=seed,
            steps=self.search_steps,
        )
        membership, guessed = self._membership()
        findings = [
            canaries,
            check_bound(strategy, spec, watched.canaries.template, seed),
            noise,
            sampling,
            disclosure,
            membership,
            judge_transcripts(out / "run", strategy),
        ]
        return Audited(
            protection=strategy.protection(),
            claim=claim,
            findings=findings,
            facts=_facts(history.reports, len(self.simulation.population), watched.canaries),
            scores=scores,
            estimate=estimate,
            bound=bound,
            residuals=residuals,
            sizes=sizes,
            cases=cases,
            membership=guessed,
        )

    def _canaries(
        self, live: _Live, reports: Sequence[RoundReport], claim: Mapping[str, Any] | None
    ) -> tuple[Finding, tuple[NDArray[np.float64], NDArray[np.float64]], Estimate, float]:
        watched, scores = self._watched, live.scores
        included, dimension = watched.canaries.included, watched.canaries.dimension
        delta = _DELTA if claim is None else float(claim["delta"])
        rate = rate_of(self.simulation.sampling, len(watched))
        multiplier = multiplier_of(self.simulation)
        ratios = scores.every if multiplier is None else scores.likelihood(1 / multiplier, rate)
        root = math.sqrt(dimension)
        every = canary_estimate(scores.every[included] / root, dimension, delta)
        final = canary_estimate(scores.final[included] / root, dimension, delta)
        bound = one_run_bound(ratios[included], ratios[~included], delta=delta)
        first = len(watched.real)
        lost = sum(row.client >= first for report in reports for row in report.excluded)
        pair = (scores.every[included], scores.every[~included])
        return (
            judge_canaries(claim, every, final, bound, (ratios[included], ratios[~included]), lost),
            pair,
            every,
            (bound[0]),
        )

    @cached_property
    def _seed(self) -> int:
        return secrets.randbits(62) if self.seed is None else self.seed

    @cached_property
    def _watched(self) -> Watched:
        simulation = self.simulation
        spec = simulation.trainer.spec
        template = self._template()
        most_useful = 64 if simulation.strategy.privacy() is None else 1000  # without a claim, a few tell enough
        count = min(most_useful, max(16, spec.parameter_count // 8)) if self.canaries is None else self.canaries
        length = float(template.values.double().norm())
        if simulation.strategy.privacy() is not None:
            bound = simulation.strategy.pipeline().l2_bound(math.inf)
            length = _LOUD * max(length, bound if math.isfinite(bound) else 0.0)
        real, most = simulation.population, most_at_once(simulation)
        if most is not None and self.canaries is None:
            count = max(8, min(count, most))
        canaries = Canaries(count, spec.parameter_count, length, template, self._seed)
        if most is not None and len(real) + len(canaries.members) > most:
            if most <= len(canaries.members):
                raise ConfigError(f"{count} canaries are too many for cohorts of at most {most}; take {most} or fewer")
            real = FirstClients(real, most - len(canaries.members))
        return Watched(real, canaries)

    def _template(self) -> Update:
        """Return what the first client would send in the first round, before any protection."""
        simulation = self.simulation
        data = simulation.population.load(0).train
        start = simulation.trainer.initial()
        update = simulation.trainer.train(
            start, data, simulation.training, round_number=1, key=(simulation.seed, "audit", "template")
        )
        if not bool(torch.isfinite(update.values).all()):
            raise ConfigError("the first client's training diverged; lower the learning rate before an audit")
        return update

    def _with_canaries(self, watched: Watched) -> Simulation:
        simulation = self.simulation
        return dataclasses.replace(
            simulation,
            clients=watched,
            engine=with_canaries(simulation.engine, watched),
            evaluation=EvaluationPlan(every=0, server=simulation.evaluation.server),
            early_stopping=None,
            faults=Faults(),
            fleet=None,
        )

    def _membership(self) -> tuple[Finding, Membership | None]:
        simulation = self.simulation
        task = simulation.task
        if self.shadows == 0 or task.classes is None or task.train_data is None or task.test_data is None:
            return infer_membership(
                task, torch.zeros(0), simulation.training, passes=1, shadows=0, seed=self._seed, device="cpu"
            )
        quiet = EvaluationPlan(every=0, server=False)
        strategy = without_masks(simulation.strategy)  # the sums are the same, and come at once
        history = dataclasses.replace(
            simulation, strategy=strategy, evaluation=quiet, early_stopping=None, faults=Faults(), fleet=None
        ).run()
        share = sum(report.replies for report in history.reports) / len(history.reports) / len(simulation.population)
        passes = min(_MOST_PASSES, passes_of(simulation.training, len(history.reports), share))
        return infer_membership(
            task,
            history.parameters,
            simulation.training,
            passes=passes,
            shadows=self.shadows,
            seed=self._seed,
            device=simulation.device,
        )


class _Live:
    """Watches the rounds: keeps no release, only what it has in common with each canary."""

    def __init__(self, canaries: Canaries, initial: Tensor) -> None:
        self._canaries, self._initial, self._last = canaries, initial, initial
        self._steps = torch.zeros_like(initial)
        self._rounds: list[NDArray[np.float64]] = []

    def __call__(self, report: RoundReport, state: RunState) -> None:
        """Take the model after a round."""
        parameters = state.parameters
        root = math.sqrt(self._canaries.dimension)
        step = parameters - self._last
        self._rounds.append(root * self._canaries.cosines(step))
        self._steps = self._steps + step / step[: self._canaries.dimension].norm().clamp_min(1e-30)
        self._last = parameters

    @property
    def scores(self) -> Scores:
        """Return the scores of all rounds."""
        root = math.sqrt(self._canaries.dimension)
        every, final = self._canaries.cosines(self._steps), self._canaries.cosines(self._last - self._initial)
        return Scores(np.stack(self._rounds), root * every, root * final)


def _facts(reports: Sequence[RoundReport], population: int, canaries: Canaries) -> dict[str, Any]:
    participations: dict[int, int] = {}
    for report in reports:
        for client in report.participants:
            participations[client] = participations.get(client, 0) + 1
    return {
        "rounds": len(reports),
        "clients": population,
        "canaries": canaries.count,
        "canaries_included": len(canaries.members),
        "parameters": canaries.dimension,
        "cohort_sizes": [report.cohort for report in reports][:1000],
        "most_participations": max(participations.values(), default=0),
        "secure": next((report.secure for report in reversed(reports) if report.secure), None),
    }
