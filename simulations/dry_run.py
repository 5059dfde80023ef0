"""`fedveil dry-run`: what a site would answer a run, before anybody asks; nothing is trained, sent or written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clients.asked import Asked, Event, Sum, mechanisms
from clients.gate import due
from clients.ledger import Books
from clients.policy import Policy
from clients.secure_policy import CohortFloor
from fedml_core.config import RunConfig, SiteConfig, load_run, load_site
from fedml_core.console import Console
from fedml_core.errors import FedveilError, PrivacyError, RefusalError
from fedml_core.loading import load_task
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.ledger import Purpose
from fedml_core.secagg.parameters import Parameters
from server.configure import plan_from
from server.plan import Plan
from server.wording import privacy_terms
from simulations.private_clients import EXAMPLES_DIFFER
from strategies.secure import AssistedOneShot, SecAggPlus, SecureAggregation

__all__ = ["answer", "say_answer"]

_RUN = "dry-run"


def say_answer(console: Console, site: Path, run: Path, server: str) -> int:
    """Say what the site of a site.toml would answer the run of a run.toml. `server`: HOST:PORT, as the policy sees it.

    Returns: the command's exit code: 0 if every round would be answered, else that of a run that is refused so: 1 for
        what the site's policy or budget refuses, 2 for privacy that cannot be accounted for.
    Raises: ConfigError, TaskError, StrategyError: if one of the files is faulty.
    """
    config, asked = load_site(site), load_run(run)
    load_task(asked.task, asked.folder)  # so that the user's own strategies are known by name
    found = answer(config, asked, server)
    for row in found["rounds"]:
        said = "would be answered" if row["rule"] is None else f"would be refused: {row['rule']}: {row['reason']}"
        console.say(f"round {row['round']}: {said}")
    console.say(f"protected by: {found['protection'] or 'nothing that this site can see'}")
    for cost in found["example_privacy"] or ():
        said = f"epsilon {cost['epsilon']:.4g}{privacy_terms(cost)}"
        console.say(f"by round {cost['round']} this run has cost an example of this site: {said}")
    if asked.clients.examples is not None:
        console.say(
            "the run's [clients.examples] is for simulated clients; this site protects examples by its site.toml"
        )
    if found["exit_code"]:
        number, code = found["rounds"][-1]["round"], found["exit_code"]
        console.note(f"error: round {number} would be refused, so this ends with {code}, as a refused run does")
    console.result(found)
    return int(found["exit_code"])


def answer(config: SiteConfig, asked: RunConfig, server: str) -> dict[str, Any]:
    """Return what the site would answer the first round, the first one that it would refuse, and the last one.

    As if it took part in every round. Where the site protects its examples, `example_privacy` is what the rounds that
    it would answer cost one of them; else None. `exit_code`: see `say_answer`.
    """
    plan, books, policy = plan_from(asked), Books(config), Policy(config.policy)
    first = _one(config, plan, books, policy, _asked(config, plan, server, 1))
    answers = [(1, first)]
    if first.refusal is None:
        answers += _affordable(config, plan, books, policy, server, asked.rounds)
    rows, refusal = [_row(number, answered) for number, answered in answers], answers[-1][1].refusal
    done = {row["round"] if row["rule"] is None else row["round"] - 1 for row in rows} - {0}
    return {
        "answer": "answered" if refusal is None else "refused",
        "exit_code": 0 if refusal is None else refusal.exit_code,
        "protection": first.protection,
        "rounds": rows,
        "example_privacy": _example_costs(config, plan, books, sorted(done)),
    }


def _example_costs(config: SiteConfig, plan: Plan, books: Books, rounds: Sequence[int]) -> list[dict[str, Any]] | None:
    """Return what the site's own training costs an example by the end of each of `rounds`."""
    event = _example_event(config, plan)
    if event is None:
        return None
    about: dict[str, Any] = {"delta": books.table.delta, "unit": "example", "adjacency": EXAMPLES_DIFFER}
    spent = {number: [{"name": "repeated", "count": number, "event": event}] for number in rounds}
    return [{"round": number, **epsilon_of(events, **about).to_json()} for number, events in spent.items()]


def _example_event(config: SiteConfig, plan: Plan) -> Event | None:
    """Return what the site's own training of a round does to its examples, or None where it protects none."""
    if config.examples is None:
        return None
    from clients.private_training import PrivateTraining

    return PrivateTraining.of(config.examples).event(plan.training)


class _Answered:
    """What would protect a round, and what would be said against it."""

    def __init__(self, protection: str, refusal: RefusalError | PrivacyError | None) -> None:
        self.protection, self.refusal = protection, refusal


def _affordable(
    config: SiteConfig, plan: Plan, books: Books, policy: Policy, server: str, rounds: int
) -> list[tuple[int, _Answered]]:
    """Return the first round that would be refused, by bisection, or else the last one."""

    def at(number: int) -> _Answered:
        return _one(config, plan, books, policy, _asked(config, plan, server, number))

    last = at(rounds)
    if last.refusal is None:
        return [(rounds, last)] if rounds > 1 else []
    good, bad, found = 1, rounds, last
    while bad - good > 1:
        middle = (good + bad) // 2
        tried = at(middle)
        good, bad, found = (middle, bad, found) if tried.refusal is None else (good, middle, tried)
    return [(bad, found)]


def _one(config: SiteConfig, plan: Plan, books: Books, policy: Policy, asked: Asked) -> _Answered:
    protection = ""
    try:
        _check_secure(config, plan)
        found = policy.check(asked)
        protection = "+".join(sorted(found))
        purpose = Purpose(_RUN, asked.server, asked.round, protection, participation=asked.participation)
        books.check_unit(found)
        own = _example_event(config, plan)
        rows = due(asked, found)
        if own is not None:
            policy.check_example(own)
            rows = [*rows, (own, "example")]
        for event, unit in rows:
            books.check(event, unit, purpose)
            _check_so_far(books, event, unit, purpose)
    except (RefusalError, PrivacyError) as error:
        return _Answered(protection, error)
    return _Answered(protection, None)


def _check_so_far(books: Books, event: Event | None, unit: str, purpose: Purpose) -> None:
    """Raise if this round and those before it would exceed what lasts longer than a round."""
    budget = books.budget
    if event is None or budget is None or unit != budget.unit or purpose.round == 1:
        return
    if budget.epsilon is None and budget.epsilon_per_run is None:
        return
    whole_run = all(part.name in ("tree", "matrix") for _, part in mechanisms(event))
    spent = event if whole_run else {"name": "repeated", "count": purpose.round, "event": event}
    books.ledger.check(spent, books.account(unit), purpose, dataclasses.replace(budget, epsilon_per_round=None))


def _asked(config: SiteConfig, plan: Plan, server: str, number: int) -> Asked:
    strategy, terms = plan.strategy, plan.strategy.privacy()
    secure = None
    if isinstance(strategy, SecureAggregation):
        protocol = strategy.protocol
        share = getattr(protocol, "corrupt_share", 0.0)
        secure = Sum(protocol.minimum - math.floor(share * protocol.minimum))
    return Asked(
        run=_RUN,
        server=server,
        round=number,
        training=plan.training,
        pipeline=strategy.client_half(),
        secure=secure,
        promised=strategy.pipeline().event() if terms is not None and terms.server_noise else None,
        example=config.examples is not None,
        participation=number,
    )


def _check_secure(config: SiteConfig, plan: Plan) -> None:
    """Raise what the site would say to the run's kind of sum, before anything is trained."""
    table, strategy = config.secure_aggregation, plan.strategy
    if not isinstance(strategy, SecureAggregation):
        if table.required:
            raise RefusalError("secure-aggregation", "this site trains under secure aggregation only")
        return
    if table.operator is None and not table.allow_semi_honest:
        raise RefusalError(
            "secure-aggregation",
            "this site has no pinned roster, so it takes part in no secure sum; name one in its site.toml",
        )
    protocol = strategy.protocol
    if isinstance(protocol, AssistedOneShot):
        CohortFloor(table).check_assistants(protocol.assistants)
    if isinstance(protocol, SecAggPlus):
        CohortFloor(table).check(
            Parameters(
                run=_RUN,
                round=1,
                attempt=0,
                length=1,
                bits=32,
                encoding={},
                minimum=protocol.minimum,
                corrupt_share=protocol.corrupt_share,
                dropout_share=protocol.dropout_share,
                active=protocol.active,
                security_bits=protocol.security_bits,
            )
        )


def _row(number: int, answered: _Answered) -> dict[str, Any]:
    refusal: FedveilError | None = answered.refusal
    if refusal is None:
        return {"round": number, "rule": None, "reason": None}
    rule = refusal.rule if isinstance(refusal, RefusalError) else "privacy"
    return {"round": number, "rule": rule, "reason": str(refusal)}
