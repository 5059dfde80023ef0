"""The audit of a site that protects its examples: canaries among them, its clipping, noise, batches and books."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clients.private_trainer import Reserve
from clients.private_training import PrivateTraining
from fedml_core.data import Examples
from fedml_core.errors import FedveilError
from fedml_core.privacy.goodness import SizeTest
from fedml_core.task import Task
from server.round import RoundReport
from simulations.audit.books import check_example_books
from simulations.audit.engine_trainer import EngineTrainer, own_engine
from simulations.audit.example_canaries import Attacked, attack_gradients, attack_labels
from simulations.audit.example_mechanism import check_batches, check_example_clipping, check_example_noise
from simulations.audit.example_site import AuditedTrainer, ExampleSite, Make
from simulations.audit.findings import Finding, Verdict
from simulations.audit.live import most_participations
from simulations.audit.mechanism import Residuals
from simulations.engines.engine import Engine
from simulations.simulate import Simulation

__all__ = ["ExamplesAudited", "audit_examples", "maker_of", "site_of"]

_CANARIES = 1000
Tell = Callable[[str], object]


@dataclass(frozen=True)
class ExamplesAudited:
    """What was found about one site's examples. `attacked`: by gradient canaries, unless that failed."""

    findings: Sequence[Finding]
    attacked: Attacked | None = field(default=None, repr=False)
    residuals: Residuals | None = field(default=None, repr=False)
    sizes: SizeTest | None = field(default=None, repr=False)


def audit_examples(
    site: ExampleSite,
    *,
    printed: Mapping[str, Any] | None = None,
    canaries: int | None = None,
    tell: Tell = lambda text: None,
) -> ExamplesAudited:
    """Attack one site's private training, and return what was found.

    Args: printed: the claim about examples that the run ended with. canaries: coins of each attack; None for 1,000.
        tell: is told what is being done.
    """
    count = _CANARIES if canaries is None else canaries
    tell(f"examples: {count} gradient canaries")
    gradients = attack_gradients(site, count)
    tell("examples: mislabelled canaries")
    labels = attack_labels(site, _pool(site), count, tell)
    tell("examples: clipping, noise and batches by themselves")
    noise, residuals = check_example_noise(site)
    batches, sizes = check_batches(site)
    findings = [
        _trainer_of(site),
        gradients.finding if isinstance(gradients, Attacked) else gradients,
        labels.finding if isinstance(labels, Attacked) else labels,
        check_example_clipping(site),
        noise,
        batches,
        check_example_books(site, printed),
    ]
    return ExamplesAudited(findings, gradients if isinstance(gradients, Attacked) else None, residuals, sizes)


def site_of(simulation: Simulation, reports: Sequence[RoundReport], seed: int) -> ExampleSite | None:
    """Return the first client of a simulation, as often as one of them took part; None where it protects no examples.

    Raises: TaskError: if the model cannot be trained privately.
    """
    private = simulation.private
    if private is None:
        return None
    rounds = max(1, most_participations(reports))
    data = ExampleSite.examples(simulation.population.load(0).train)
    engine, delta = own_engine(simulation), float(simulation.budget.delta)
    name = "" if engine is None else engine.name
    make = maker_of(simulation, private, engine)
    return ExampleSite(simulation.task, data, make, private, simulation.training, rounds, delta, seed, name)


def maker_of(simulation: Simulation, private: PrivateTraining, engine: Engine | None) -> Make:
    """Return what makes trainers: those of real sites, or, where the run has one, an engine with a step of its own."""
    seed, device = simulation.seed, simulation.device

    def make(task: Task, reserve: Reserve) -> AuditedTrainer:
        if engine is not None:
            return EngineTrainer(task, private, reserve, engine, seed=seed, device=device)
        from clients.private_trainer import PrivateTorchTrainer  # loads Opacus, which other audits do without

        return PrivateTorchTrainer(task, private, reserve, seed=seed, device=device)

    return make


def _trainer_of(site: ExampleSite) -> Finding:
    by = f"the {site.engine} engine, as in the run" if site.engine else "the trainer that real sites use"
    return Finding("example trainer", Verdict.INFO, f"one client's examples are attacked; it is trained by {by}")


def _pool(site: ExampleSite) -> Examples:
    """Return whose inputs mislabelled examples have: the task's test data where there are some, else the site's own."""
    try:
        held = site.task.test_data() if site.task.test_data is not None else None
        return site.data if held is None else ExampleSite.examples(held)
    except FedveilError:
        return site.data
