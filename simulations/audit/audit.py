"""An audit as one value: the run is done with canaries in it, and everything that it claims is put to the test."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.checks import require_whole
from fedml_core.privacy.auditing import Estimate, canary_estimate, one_run_bound
from fedml_core.privacy.goodness import SizeTest
from server.history import History
from server.record import Callback
from simulations.audit.books import Record, check_books, check_ledger
from simulations.audit.canaries import Watched
from simulations.audit.cohorts import check_sampling, rate_of
from simulations.audit.configured import multiplier_of
from simulations.audit.disclosure import Case, check_disclosure
from simulations.audit.example_audit import ExamplesAudited, audit_examples, maker_of, site_of
from simulations.audit.example_site import AuditedTrainer
from simulations.audit.findings import Finding, Verdict, overall
from simulations.audit.judging import judge_canaries, judge_transcripts
from simulations.audit.live import Live, facts_of
from simulations.audit.mechanism import Residuals, check_bound, check_noise
from simulations.audit.shadows import Membership, infer_membership, require_shadows
from simulations.audit.staging import masked_alone, run_masked, run_quietly, run_watched, shortened, watched_by
from simulations.baseline import passes_of
from simulations.simulate import Simulation

__all__ = ["Audit", "Audited"]

_MOST_PASSES = 30
_DELTA = 1e-5  # where no delta is claimed
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Audited:
    """What an audit found. `claim`: the run's own about clients, `example_claim`: about examples, each or None. The
    rest is what its pictures are drawn from.
    """

    protection: str
    claim: Mapping[str, Any] | None
    example_claim: Mapping[str, Any] | None
    findings: Sequence[Finding]
    facts: Mapping[str, Any]
    scores: tuple[NDArray[np.float64], NDArray[np.float64]] = field(repr=False)
    estimate: Estimate
    bound: float
    residuals: Residuals | None = field(default=None, repr=False)
    sizes: SizeTest | None = field(default=None, repr=False)
    cases: Sequence[Case] = field(default=(), repr=False)
    membership: Membership | None = field(default=None, repr=False)
    examples: ExamplesAudited | None = field(default=None, repr=False)

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
            "example_claim": self.example_claim,
            **self.facts,
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """An audit of one simulated run.

    Args: simulation: the run; its simulated faults and its fleet are left out. canaries: how many coins are tossed;
        about half of them take part. None for an eighth of the model's parameters, 16 to 1,000, and at most 64 where
        no privacy is claimed; of examples, for 1,000. shadows: models for membership inference, 0 for none.
        search_steps: of the search for inputs in gradient inversion. seed: of directions, coins and shadows; None draws
        a fresh one. record: where an earlier run of the same file left its ledger.
    Raises: ConfigError: if a number is out of range.
    """

    simulation: Simulation
    canaries: int | None = None
    shadows: int = 16
    search_steps: int = 300
    seed: int | None = None
    record: Record | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.canaries is not None:
            require_whole("canaries", self.canaries, at_least=8, at_most=100_000)
        require_whole("search_steps", self.search_steps, at_least=1)
        require_shadows("shadows", self.shadows)

    @property
    def rounds(self) -> int:
        """Return how many rounds are attacked."""
        return self._attacked.rounds

    def run(self, out: Path, callbacks: Sequence[Callback] = (), *, tell: Tell = lambda text: None) -> Audited:
        """Run the federation with canaries into the folder `out` / "run", and every test beside it.

        Args: callbacks: called after each round. tell: is told what is being done besides rounds.
        Raises: FedveilError: if the run itself cannot be done.
        """
        live = Live(self._watched.canaries, self._attacked.trainer.initial())
        run, history = run_watched(self._attacked, self._watched, out / "run", live, *callbacks)
        clients, audited = self._of_clients(run, history, live, tell)
        site = site_of(self._attacked, history.reports, self._seed)
        last = history.reports[-1]
        examples = (
            None
            if site is None
            else audit_examples(site, printed=last.example_privacy, canaries=self.canaries, tell=tell)
        )
        disclosure, cases = self._disclosure(audited.claim or last.example_privacy, tell)
        membership, guessed = self._membership(tell)
        return dataclasses.replace(
            audited,
            protection=audited.protection if site is None else last.protection,
            example_claim=last.example_privacy,
            findings=[
                *clients,
                *(() if examples is None else examples.findings),
                *(() if self.record is None else [check_ledger(self.record)]),
                disclosure,
                membership,
                self._transcripts(out, tell),
            ],
            cases=cases,
            membership=guessed,
            examples=examples,
        )

    def _of_clients(self, run: Simulation, history: History, live: Live, tell: Tell) -> tuple[list[Finding], Audited]:
        """Return what was found about the claim on clients, and the audit as far as that goes."""
        simulation, strategy, watched = self._attacked, self._attacked.strategy, self._watched
        spec, start, reports = simulation.trainer.spec, simulation.trainer.initial(), history.reports
        tell("noise and cohorts")
        noise, residuals = check_noise(strategy, spec, start, self._seed)
        observed = [report.cohort for report in reports]
        sampling, sizes = check_sampling(run.sampling, len(watched), observed, self._seed)
        claim = reports[-1].privacy if strategy.privacy() is not None else None
        canaries, scores, estimate, bound = self._canaries(live, history, claim)
        bounded = check_bound(strategy, spec, watched.canaries.template, self._seed)
        books = check_books(strategy, run.sampling, len(watched), reports, live.events)
        return [canaries, bounded, noise, sampling, books], Audited(
            protection=strategy.protection(),
            claim=claim,
            example_claim=None,
            findings=(),
            facts={
                "rounds_of_the_run": self.simulation.rounds,
                **facts_of(reports, len(simulation.population), watched.canaries),
            },
            scores=scores,
            estimate=estimate,
            bound=bound,
            residuals=residuals,
            sizes=sizes,
        )

    def _canaries(
        self, live: Live, history: History, claim: Mapping[str, Any] | None
    ) -> tuple[Finding, tuple[NDArray[np.float64], NDArray[np.float64]], Estimate, float]:
        watched, scores = self._watched, live.scores
        included, dimension = watched.canaries.included, watched.canaries.dimension
        delta = _DELTA if claim is None else float(claim["delta"])
        rate = rate_of(self._attacked.sampling, len(watched))
        multiplier = multiplier_of(self._attacked)
        ratios = scores.every if multiplier is None else scores.likelihood(1 / multiplier, rate)
        root = math.sqrt(dimension)
        every = canary_estimate(scores.every[included] / root, dimension, delta)
        final = canary_estimate(scores.final[included] / root, dimension, delta)
        bound = one_run_bound(ratios[included], ratios[~included], delta=delta)
        first = len(watched.real)
        lost = sum(row.client >= first for report in history.reports for row in report.excluded)
        pair = (scores.every[included], scores.every[~included])
        judged = judge_canaries(claim, every, final, bound, (ratios[included], ratios[~included]), lost)
        if len(history.reports) < self.simulation.rounds:
            some = f"in the first {len(history.reports)} of {self.simulation.rounds} rounds: {judged.said}"
            judged = dataclasses.replace(judged, said=some)
        return judged, pair, every, bound[0]

    @cached_property
    def _seed(self) -> int:
        return secrets.randbits(62) if self.seed is None else self.seed

    @cached_property
    def _attacked(self) -> Simulation:
        return shortened(self.simulation)

    @cached_property
    def _watched(self) -> Watched:
        return watched_by(self._attacked, self.canaries, self._seed)

    def _disclosure(self, claim: Mapping[str, Any] | None, tell: Tell) -> tuple[Finding, list[Case]]:
        simulation = self._attacked
        tell("gradient inversion of what was seen of one client")
        return check_disclosure(
            simulation.task,
            simulation.strategy,
            _trainer(simulation),
            simulation.population,
            simulation.training,
            epsilon=None if claim is None else float(claim["epsilon"]),
            seed=self._seed,
            steps=self.search_steps,
            noised=simulation.private is not None,
        )

    def _membership(self, tell: Tell) -> tuple[Finding, Membership | None]:
        simulation = self._attacked
        task = simulation.task
        known = task.classes is not None and task.train_data is not None and task.test_data is not None
        trainer, passes, parameters = _trainer(simulation), 1, simulation.trainer.initial()
        if self.shadows and known:
            tell(f"membership: the run without canaries, and {self.shadows} shadow models")
            history = run_quietly(simulation)
            replies = sum(report.replies for report in history.reports)
            share = replies / len(history.reports) / len(simulation.population)
            passes = min(_MOST_PASSES, passes_of(simulation.training, len(history.reports), share))
            parameters = history.parameters
        return infer_membership(
            task, parameters, simulation.training, trainer, passes=passes, shadows=self.shadows, seed=self._seed
        )

    def _transcripts(self, out: Path, tell: Tell) -> Finding:
        simulation = self._attacked
        if not masked_alone(simulation, len(self._watched)):
            return judge_transcripts(out / "run", simulation.strategy)
        tell("one secure sum with every mask, key and signature")
        history = run_masked(simulation, out / "masked")
        replies = history.reports[-1].replies
        said = f"one sum of {replies} members, the fewest; the run's own were added up without masks"
        return judge_transcripts(out / "masked", simulation.strategy, said)


def _trainer(simulation: Simulation) -> AuditedTrainer:
    """Return what trains a client: privately, where all clients do."""
    if simulation.private is None:
        return simulation.trainer
    return maker_of(simulation, simulation.private, None)(simulation.task, lambda event: None)
