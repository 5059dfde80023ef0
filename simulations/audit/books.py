"""What a run wrote down of its privacy, against what it did: its rounds, its events, its ledger, what it printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedml_core.config import RunConfig
from fedml_core.errors import CheckpointError, FedveilError, PrivacyError
from fedml_core.policy_tables import BudgetTable
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.events import canonical
from fedml_core.privacy.ledger import Entry, Ledger
from fedml_core.storage import load_tree
from server.checkpoint import FILE_NAME
from server.history import read_history
from server.ledger import ledger_path
from server.round import RoundReport
from server.sampling import Sampling
from simulations.audit.correlated_noise import CORRELATED
from simulations.audit.example_site import ExampleSite
from simulations.audit.findings import Finding, Verdict
from strategies.strategy import Strategy

__all__ = ["Record", "check_books", "check_example_books", "check_ledger"]

_SLACK = 2e-3  # of an epsilon: how far two grids of one accountant may be apart
Event = Mapping[str, Any]


def check_books(
    strategy: Strategy, sampling: Sampling, population: int, reports: Sequence[RoundReport], spent: Sequence[Event]
) -> Finding:
    """Return whether a run counted every round, and printed no less than its rounds cost.

    Args: reports: of every round. spent: the events that the run's state holds after the last.
    """
    what, terms, event = "books", strategy.privacy(), strategy.pipeline().event()
    printed = [report.privacy for report in reports if report.privacy and report.privacy["unit"] == "client"]
    if terms is None or event is None:
        return Finding(what, Verdict.INFO, "no epsilon is claimed for clients, so none is counted")
    if len(printed) < len(reports):
        return Finding(what, Verdict.FAIL, f"{len(reports) - len(printed)} rounds printed no epsilon, and one is owed")
    if terms.rounds is not None:
        done = [event]  # one event for the whole run
    else:
        one = sampling.event(population, event) if terms.secret_cohort else event
        done = [{"name": "repeated", "count": len(reports), "event": one}]
    adjacency = terms.adjacent(sampling.adjacency)
    try:
        owed = epsilon_of(done, delta=terms.delta, unit="client", adjacency=adjacency).epsilon
        counted = epsilon_of(spent, delta=terms.delta, unit="client", adjacency=adjacency).epsilon if spent else 0.0
    except PrivacyError as error:
        return Finding(what, Verdict.FAIL, f"nothing accounts for what the run did: {error}")
    epsilons = [float(claim["epsilon"]) for claim in printed]
    numbers = {"rounds": len(reports), "owed": owed, "counted": counted, "printed": epsilons[-1]}
    flaw = _flaw(epsilons, owed, counted)
    if flaw:
        return Finding(what, Verdict.FAIL, flaw, numbers)
    said = f"{len(reports)} rounds cost epsilon {owed:.4g}, and the run printed {epsilons[-1]:.4g}"
    return Finding(what, Verdict.PASS, said, numbers)


def _flaw(epsilons: Sequence[float], owed: float, counted: float) -> str:
    if counted < owed * (1 - _SLACK):
        return f"the run's events cost epsilon {counted:.4g}, and its rounds {owed:.4g}: not all of them were counted"
    if epsilons[-1] < owed * (1 - _SLACK):
        return f"the run printed epsilon {epsilons[-1]:.4g}, and its rounds cost {owed:.4g}"
    fell = next((place for place in range(1, len(epsilons)) if epsilons[place] < epsilons[place - 1]), None)
    return "" if fell is None else f"the epsilon that was printed fell from round {fell} to round {fell + 1}"


def check_example_books(site: ExampleSite, printed: Mapping[str, Any] | None) -> Finding:
    """Return whether each training was entered into an account, and as many were printed as were done.

    Args: printed: the run's claim about the examples of the client that trained most often.
    """
    what, asked, reserved = "example books", site.account.asked, site.account.reserved
    numbers: dict[str, Any] = {"trainings": len(asked), "reserved": len(reserved)}
    if len(reserved) != len(asked):
        said = f"{len(asked)} trainings were done, and {len(reserved)} were entered into the account"
        return Finding(what, Verdict.FAIL, said, numbers)
    if any(canonical(one) != canonical(other) for one, other in zip(asked, reserved, strict=True)):
        return Finding(what, Verdict.FAIL, "the account was told of other trainings than those that were done", numbers)
    if printed is None:
        return Finding(what, Verdict.PASS, f"each of {len(asked)} trainings was entered into the account", numbers)
    owed, said_to_be = site.claim(site.steps).epsilon, float(printed["epsilon"])
    numbers |= {"owed": owed, "printed": said_to_be, "rounds": site.rounds}
    if said_to_be < owed * (1 - _SLACK):
        said = (
            f"the run printed epsilon {said_to_be:.4g} for the client that trained most often, and its {site.rounds} "
            f"trainings cost {owed:.4g}"
        )
        return Finding(what, Verdict.FAIL, said, numbers)
    said = f"{site.rounds} trainings cost epsilon {owed:.4g}, and the run printed {said_to_be:.4g}"
    return Finding(what, Verdict.PASS, said, numbers)


@dataclass(frozen=True)
class Record:
    """Where a run of the same file left its history, and its ledger, if it did.

    `head`: of the ledger, if it moved. `budget`: what the run might spend.
    """

    folder: Path
    ledger: Path
    head: Path | None = None
    budget: BudgetTable | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Record:
        """Return where a run.toml's own run writes."""
        folder = Path(config.out).expanduser()
        head = None if config.ledger.head is None else config.beside(config.ledger.head)
        return cls(folder, ledger_path(config, folder), head, config.budget)

    def run(self) -> tuple[str, Sequence[RoundReport]] | None:
        """Return the recorded run's id and its rounds under a claim about clients; None where there is no such run.

        Raises: FedveilError: if what is there cannot be read.
        """
        if not (self.folder / FILE_NAME).exists():
            return None
        run = str(load_tree(self.folder / FILE_NAME, "checkpoint")["run"])
        reports = read_history(self.folder)
        claimed = [report for report in reports if report.privacy and report.privacy["unit"] == "client"]
        return (run, claimed) if claimed else None


def check_ledger(record: Record) -> Finding:
    """Return whether the ledger's chain holds, and whether the recorded run's rounds are in it, at what they printed.

    A ledger that was refunded or begun anew lacks rounds that the history has, or costs less than was printed.
    """
    what, head = "ledger", record.head or record.ledger.with_name(f"{record.ledger.name}.head")
    if not record.ledger.exists() and not head.exists():
        return Finding(what, Verdict.INFO, "no run of this file has kept a ledger here, so there is none to check")
    ledger = Ledger(record.ledger, head=record.head)
    try:
        entries, last = ledger.known(), ledger.verify()
    except CheckpointError as error:
        return Finding(what, Verdict.FAIL, f"the ledger cannot be believed: {error}")
    numbers: dict[str, Any] = {"entries": last.number, "hash": last.digest}
    chain = f"the chain of {last.number} entries holds"
    try:
        recorded = record.run()
    except FedveilError as error:
        return Finding(what, Verdict.WARN, f"{chain}, and the recorded run cannot be read: {error}", numbers)
    if recorded is None:
        return Finding(what, Verdict.PASS, f"{chain}; no recorded run is there to compare it with", numbers)
    run, reports = recorded
    mine = [entry for entry in entries if entry.run == run and entry.unit == "client"]
    try:
        found = _compared(mine, reports, {**numbers, "run": run, "rounds": len(reports)}, chain)
        beyond = _beyond(record.budget, mine)
        return found if not beyond else Finding(what, Verdict.FAIL, f"{chain}, and {beyond}", found.numbers)
    except PrivacyError as error:
        return Finding(what, Verdict.FAIL, f"nothing accounts for the ledger's entries: {error}", numbers)


def _compared(entries: Sequence[Entry], reports: Sequence[RoundReport], numbers: dict[str, Any], chain: str) -> Finding:
    what, claim = "ledger", reports[-1].privacy or {}
    events = [entry.event for entry in entries if entry.event is not None]
    # Noise for a whole run is one event, which its first round enters.
    known = {entry.round for entry in entries}
    owed = [report.round for report in reports][: 1 if any(_whole_run(event) for event in events) else None]
    if missing := [number for number in owed if number not in known]:
        said = f"{chain}, and it lacks round {missing[0]} of the recorded run: it was begun anew, or refunded"
        return Finding(what, Verdict.FAIL, said, {**numbers, "missing": missing[:20]})
    spent = epsilon_of(events, delta=float(claim["delta"]), unit="client", adjacency=str(claim["adjacency"])).epsilon
    numbers |= {"spent": spent, "printed": float(claim["epsilon"])}
    if spent < float(claim["epsilon"]) * (1 - _SLACK):
        said = f"the ledger's entries cost epsilon {spent:.4g}, and the run printed {claim['epsilon']:.4g}"
        return Finding(what, Verdict.FAIL, said, numbers)
    if float(claim["epsilon"]) < spent * (1 - _SLACK):
        said = f"the ledger's entries cost epsilon {spent:.4g}, more than the {claim['epsilon']:.4g} that was printed"
        return Finding(what, Verdict.WARN, f"{said}: rounds that were begun again count again", numbers)
    return Finding(what, Verdict.PASS, f"{chain}, and says what the run printed: epsilon {spent:.4g}", numbers)


def _beyond(budget: BudgetTable | None, entries: Sequence[Entry]) -> str:
    """Return by how much a run's entries exceed what it might spend, or ""."""
    limits = [] if budget is None else [one for one in (budget.epsilon, budget.epsilon_per_run) if one is not None]
    events = [entry.event for entry in entries if entry.event is not None]
    if budget is None or not limits or not events or budget.unit != "client":
        return ""
    spent = epsilon_of(events, delta=budget.delta, unit="client", adjacency=budget.adjacency).epsilon
    allowed = min(limits)
    return f"the run spent epsilon {spent:.4g} where the budget allows {allowed:g}" if spent > allowed else ""


def _whole_run(event: Event) -> bool:
    parts = event["events"] if event["name"] == "composed" else [event]
    return any(part["name"] in CORRELATED for part in parts)
