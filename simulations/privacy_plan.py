"""`fedveil plan`: what a run.toml would cost in privacy, and what would be left of its signal, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml_core.config import load_run
from fedml_core.console import Console
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.loading import load_task
from fedml_core.privacy.outlook import Outlook, Release, outlook
from server.books import require_accountable
from server.wording import server_saw
from simulations.configure import simulation_from
from simulations.simulate import Simulation
from strategies.private import CentralDP

__all__ = ["Question", "say_outlook"]


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
    config = load_run(question.path, question.overrides)
    simulation = simulation_from(config, load_task(config.task, config.folder))
    saw = server_saw(simulation.strategy.protection())
    console.say(f"server sees  {saw}")
    found = outlook_of(simulation, question.budget)
    if found is None:
        console.say("privacy      no differential privacy: epsilon has no bound, whatever the number of rounds")
        console.result({"privacy": None, "server_sees": saw})
        return
    for number, claim in found.claims:
        console.say(f"round {number:<6} {claim}")
    if found.release is not None:
        console.say(
            f"noise        {found.release.noise_per_coordinate:.3g} on each coordinate of the mean; the most signal is "
            f"{found.release.aligned_signal_to_noise:.3g} times as long if all updates agree, and "
            f"{found.release.independent_signal_to_noise:.3g} times if they have nothing in common"
        )
    for line in found.advice:
        console.say(f"advice       {line}")
    if question.plot is not None:
        _draw(question.plot, found, question.budget)
        console.say(f"plot         {question.plot}")
    console.result({"privacy": found.to_json(), "server_sees": saw})


def outlook_of(simulation: Simulation, budget: float | None = None) -> Outlook | None:
    """Return what the simulation's rounds would cost a client that takes part whenever it can, or None without DP.

    Raises: PrivacyError: if nothing can account for the rounds. ConfigError: if they are not as private as is claimed.
    """
    strategy, sampling = simulation.strategy, simulation.sampling
    terms = strategy.privacy()
    if terms is None:
        return None
    require_accountable(strategy, sampling, simulation.minimum_replies)
    event = strategy.pipeline().event()
    if event is None:
        raise PrivacyError(f"{type(strategy).__name__} claims privacy and reports no event; nothing can account for it")
    if terms.secret_cohort:
        event = sampling.event(len(simulation.population), event)
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
        adjacency=terms.adjacency or sampling.adjacency,
        release=_release(simulation),
        budget=budget,
    )


def _release(simulation: Simulation) -> Release | None:
    """Return what a round publishes, where the strategy says so in numbers that do not change."""
    strategy = simulation.strategy
    if not isinstance(strategy, CentralDP) or not isinstance(strategy.clip_norm, int | float) or strategy.noise:
        return None
    size = simulation.trainer.spec.size
    return Release(float(strategy.clip_norm), strategy.noise_multiplier, strategy.expected_cohort, size)


def _draw(path: Path, found: Outlook, budget: float | None) -> None:
    from server.plots_privacy import epsilon_figure

    last = found.claims[-1][1]
    terms = f"delta {last.delta:g}, {last.adjacency}, {last.sampling}"
    points = [(number, claim.epsilon) for number, claim in found.claims]
    figure = epsilon_figure({last.unit: points}, terms, budget)
    if figure is None:
        raise PrivacyError("no round has a finite epsilon, so there is nothing to draw")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
