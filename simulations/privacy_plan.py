"""`fedveil plan`: what a run.toml would cost in privacy, and what would be left of its signal, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_core.checks import require_number
from fedml_core.config import load_run
from fedml_core.console import Console
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.loading import load_task
from fedml_core.policy_tables import BudgetTable
from fedml_core.privacy.outlook import Outlook, outlook
from server.books import event_of
from server.claims import with_examples
from server.wording import server_saw
from simulations.configure import simulation_from
from simulations.private_clients import EXAMPLES_DIFFER
from simulations.releases import release_of_clients, release_of_examples
from simulations.simulate import Simulation

__all__ = ["Question", "outlooks_of", "say_outlook"]

_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Question:
    """What the command line asks. `budget`: the epsilon not to go beyond. `plot`: where a picture is written."""

    path: Path
    overrides: Sequence[str] = ()
    budget: float | None = None
    plot: Path | None = None


def say_outlook(console: Console, question: Question) -> None:
    """Say what each of some ten rounds of the run would have cost by then, and what to change.

    Raises: FedveilError: for whatever is wrong with the run.toml, its task or its privacy.
    """
    if question.budget is not None:
        require_number("--budget", question.budget, above=0)
    if question.plot is not None and question.plot.is_dir():
        raise ConfigError(
            f"--plot {question.plot} is a folder; name a file in it, such as {question.plot / 'epsilon.png'}"
        )
    if question.plot is not None and question.plot.suffix not in _PICTURES:
        raise ConfigError(f"--plot must name a file that ends in {', '.join(_PICTURES)}, got {question.plot}")
    config = load_run(question.path, question.overrides)
    simulation = simulation_from(config, load_task(config.task, config.folder))
    saw = _server_sees(simulation)
    console.say(f"server sees  {saw}")
    outlooks = outlooks_of(simulation, question.budget)
    for found in outlooks:
        _say(console, found)
    if not outlooks:
        console.say("privacy      no differential privacy: epsilon has no bound, whatever the number of rounds")
    elif question.plot is not None:
        _draw(question.plot, outlooks, question.budget)
        console.say(f"plot         {question.plot}")
    examples = next((found for found in outlooks if found.claims[-1][1].unit == "example"), None)
    console.result(
        {
            "privacy": outlooks[0].to_json() if outlooks else None,
            "example_privacy": None if examples is None else examples.to_json(),
            "server_sees": saw,
        }
    )


def _say(console: Console, found: Outlook) -> None:
    for number, claim in found.claims:
        console.say(f"round {number:<6} {claim}")
    if (release := found.release) is not None:
        share = f", an even share of what {release.share_of} rounds leave" if release.share_of > 1 else ""
        console.say(
            f"noise        {release.noise_per_coordinate:.3g} on each coordinate of a {release.once}'s mean{share}; "
            f"the most signal is {release.aligned_signal_to_noise:.3g} times as long if all {release.parts} agree, and "
            f"{release.independent_signal_to_noise:.3g} times if they have nothing in common"
        )
    for line in found.advice:
        console.say(f"advice       {line}")


def outlooks_of(simulation: Simulation, budget: float | None = None) -> list[Outlook]:
    """Return what the simulation's rounds would cost a client, and then what an example of it, where each is protected.

    As if the client took part in every round. `budget`: the epsilon not to go beyond, for clients where they are
    protected and else for examples; where none is given, the run's own, for the unit that it counts.

    Raises: PrivacyError: if nothing can account for the rounds. ConfigError: if they are not as private as is claimed.
    """
    clients = _of_clients(simulation, budget)
    examples = _of_examples(simulation, budget if clients is None else None)
    return [found for found in (clients, examples) if found is not None]


def _of_examples(simulation: Simulation, budget: float | None) -> Outlook | None:
    clients, table = simulation.private_clients, simulation.budget
    if clients is None:
        return None
    return outlook(
        clients.event,
        simulation.rounds,
        delta=table.delta,
        unit="example",
        adjacency=EXAMPLES_DIFFER,
        release=release_of_examples(simulation),
        budget=_limit(table, "example") if budget is None else budget,
    )


def _limit(table: BudgetTable, unit: str) -> float | None:
    """Return the most that a new run may spend on a unit, or None if the run has no limit for it."""
    limits = [limit for limit in (table.epsilon, table.epsilon_per_run) if limit is not None]
    return min(limits, default=None) if table.unit == unit else None


def _server_sees(simulation: Simulation) -> str:
    clients, protection = simulation.private_clients, simulation.strategy.protection()
    return server_saw(protection if clients is None else with_examples(protection, clients.protection()))


def _of_clients(simulation: Simulation, budget: float | None) -> Outlook | None:
    plan = simulation.plan  # which refuses rounds that are not as private as is claimed
    strategy, sampling = plan.strategy, plan.sampling
    terms = strategy.privacy()
    if terms is None:
        return None
    event = event_of(strategy, terms, sampling, len(simulation.population))
    rounds = simulation.rounds if terms.rounds is None else 1
    if terms.rounds is not None and simulation.rounds > terms.rounds:
        raise ConfigError(
            f"the noise is for a run of {terms.rounds} rounds, and {simulation.rounds} were asked for; ask for fewer"
        )
    return outlook(
        event,
        rounds,
        delta=terms.delta,
        unit=terms.unit,
        adjacency=terms.adjacent(sampling.adjacency),
        release=release_of_clients(simulation),
        budget=_limit(simulation.budget, terms.unit) if budget is None else budget,
    )


def _draw(path: Path, outlooks: Sequence[Outlook], budget: float | None) -> None:
    from server.plots_privacy import outlook_figure

    lasts = [found.claims[-1][1] for found in outlooks]
    terms = dict.fromkeys(f"delta {last.delta:g}, {last.adjacency}, {last.sampling}" for last in lasts)
    curves = {
        last.unit: [(number, claim.epsilon) for number, claim in found.claims]
        for last, found in zip(lasts, outlooks, strict=True)
    }
    figure = outlook_figure(curves, "; ".join(terms), budget)
    if figure is None:
        raise PrivacyError("no round has a finite epsilon, so there is nothing to draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
