"""What the attempts at one secure sum cost: in the server's books what may have been opened, in a site's what it sent.

docs/decisions/0008-what-an-attempt-costs.md says why the two differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.ledger import ledger_of
from fedml_core.errors import PrivacyError
from fedml_core.messages import Assignment
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.budget import Budget
from fedml_core.privacy.ledger import Account, Ledger
from fedml_core.privacy.terms import Terms
from server.coordinator import Coordinator, Reserve
from server.ledger import RoundBooks
from server.plan import Plan
from server.round import RoundReport
from server.sampling import PoissonSampling
from server.secagg import SecureGathering
from strategies import DistributedDP, FedAvg, SecAggPlus, SecureAggregation
from strategies.strategy import Strategy
from tests.clients.test_gate_secure import gated
from tests.secure_cases import SecureChannel, secure
from tests.server.test_distributed import COUNT, KEYS, SIZE, noised

PROTOCOL = SecAggPlus(corrupt_share=0.2, minimum=5, attempts=2)
ACCOUNT = Account("clients", "client", "replace-special")


class FirstAttempt:
    """Keeps messages of one exchange of the first attempt from some clients; of attempts after the `last`, none."""

    def __init__(self, stage: str, clients: Collection[int], last: int = 1) -> None:
        self._stage, self._clients, self._last = stage, clients, last
        self.attempts = 0

    def __call__(self, stage: str, client: int, assignment: Assignment) -> Assignment | None:
        self.attempts += stage == "advertise" and client == 0
        return None if self.attempts <= self._last and stage == self._stage and client in self._clients else assignment


def coordinator_of(strategy: SecureAggregation, channel: SecureChannel, reserve: Reserve | None) -> Coordinator:
    plan, spec = Plan(strategy), channel.trainer.spec
    gathering = SecureGathering(strategy, spec, ("examples", "loss"), KEYS.witnesses)
    state = Coordinator.begin(plan, spec, torch.zeros(channel.size), "a-run")
    return Coordinator(plan, spec, state, gathering=gathering, reserve=reserve)


def books(folder: Path, epsilon: float | None = None) -> RoundBooks:
    ledger = Ledger(folder / "server.sqlite")
    limit = {"delta": 1e-3, "unit": "client", "adjacency": "replace-special"}
    budget = None if epsilon is None else Budget(epsilon=epsilon, **limit)  # type: ignore[arg-type]  # as a file says it
    return RoundBooks(ledger, ACCOUNT, "a-run", protection="distributed", budget=budget)


def one_round(
    folder: Path, stage: str, clients: Collection[int], dp: DistributedDP, epsilon: float | None = None
) -> tuple[RoundReport, Sequence[int], Sequence[int], SecureChannel]:
    """Return the report, the rounds of the server's entries and of site 1's, and the channel."""
    channel = SecureChannel(KEYS, SIZE, tamper=FirstAttempt(stage, clients))
    site = gated(folder, channel, 1, accept=["distributed"])
    coordinator = coordinator_of(SecureAggregation(dp, PROTOCOL), channel, books(folder, epsilon))
    report = next(coordinator.rounds(channel, 3))
    server = [entry.round for entry in Ledger(folder / "server.sqlite").known()]
    return report, server, [entry.round for entry in ledger_of(site).known()], channel


def cost_of(dp: Strategy, releases: int) -> float:
    event = dp.pipeline().event()
    assert event is not None
    return epsilon_of([event] * releases, delta=1e-3, unit="client", adjacency="replace-special").epsilon


def test_an_attempt_that_ends_before_anybody_trained_costs_nobody_anything(tmp_path: Path) -> None:
    report, server, site, _ = one_round(tmp_path, "share", (2, 3), noised(noise_multiplier=4.0))
    assert report.status == "ok" and report.secure is not None and report.secure["attempts"] == 2
    assert (server, site) == ([1], [1])


def test_an_attempt_that_ends_before_its_sum_can_be_opened_costs_the_site_that_cannot_see_it_and_not_the_server(
    tmp_path: Path,
) -> None:
    dp = noised(noise_multiplier=4.0)
    report, server, site, channel = one_round(tmp_path, "mask", (2, 3), dp)
    assert report.status == "ok" and report.secure is not None and report.secure["attempts"] == 2
    assert [stage for _, stage in channel.exchanges].count("unmask") == 1
    assert (server, site) == ([1], [1, 1])
    assert report.epsilon == pytest.approx(cost_of(dp, 1), rel=2e-3)


def test_a_second_sum_after_members_were_asked_to_open_the_first_costs_twice_in_both_books(tmp_path: Path) -> None:
    dp = noised(noise_multiplier=4.0)
    report, server, site, channel = one_round(tmp_path, "unmask", (2, 3, 4), dp)
    assert report.status == "ok" and report.secure is not None and report.secure["attempts"] == 2
    assert [stage for _, stage in channel.exchanges].count("unmask") == 2
    assert (server, site) == ([1, 1], [1, 1])
    assert report.epsilon == pytest.approx(cost_of(dp, 2), rel=2e-3)
    assert cost_of(dp, 2) > 1.3 * cost_of(dp, 1)


def test_a_budget_that_has_room_for_one_sum_ends_the_round_instead_of_opening_a_second(tmp_path: Path) -> None:
    dp = noised(noise_multiplier=4.0)
    limit = (cost_of(dp, 1) + cost_of(dp, 2)) / 2
    report, server, site, channel = one_round(tmp_path, "unmask", (2, 3, 4), dp, limit)
    assert report.status == "void" and "it was not tried again: round 1 is not begun, by the run's own" in report.why
    assert (server, site) == ([1], [1])
    assert [stage for _, stage in channel.exchanges].count("advertise") == 1
    assert report.epsilon == pytest.approx(cost_of(dp, 1), rel=2e-3)


def test_the_last_attempt_is_not_followed_by_a_charge_for_one_that_never_comes(tmp_path: Path) -> None:
    dp = noised(noise_multiplier=4.0)
    channel = SecureChannel(KEYS, SIZE, tamper=FirstAttempt("unmask", (1, 2, 3, 4), last=2))
    report = next(coordinator_of(SecureAggregation(dp, PROTOCOL), channel, books(tmp_path)).rounds(channel, 3))
    assert report.status == "void" and report.secure is not None and report.secure["attempts"] == 2
    assert [entry.round for entry in Ledger(tmp_path / "server.sqlite").known()] == [1, 1]
    assert report.epsilon == pytest.approx(cost_of(dp, 2), rel=2e-3)


def test_a_resumed_run_knows_what_its_attempts_cost(tmp_path: Path) -> None:
    dp = noised(noise_multiplier=4.0)
    channel = SecureChannel(KEYS, SIZE, tamper=FirstAttempt("unmask", (2, 3, 4)))
    coordinator = coordinator_of(SecureAggregation(dp, PROTOCOL), channel, books(tmp_path))
    reports = list(coordinator.rounds(channel, 2))
    assert [report.status for report in reports] == ["ok", "ok"]
    assert coordinator.state.events[0]["count"] == 3
    assert [entry.round for entry in Ledger(tmp_path / "server.sqlite").entries()] == [1, 1, 2]


def test_where_nothing_is_claimed_a_round_is_tried_again_as_before() -> None:
    channel = SecureChannel(KEYS, SIZE, tamper=FirstAttempt("unmask", (1, 2, 3)))
    coordinator = coordinator_of(secure(FedAvg()), channel, None)
    report = next(coordinator.rounds(channel, 1))
    assert report.status == "ok" and report.secure is not None and report.secure["attempts"] == 2
    assert report.epsilon is None


@dataclasses.dataclass(frozen=True)
class _Secret(DistributedDP):
    """A strategy that claims that nobody sees who takes part."""

    def privacy(self) -> Terms:
        """Return terms under which sampling amplifies."""
        return Terms(delta=self.delta)


def test_a_second_sum_of_a_secret_cohort_is_not_taken_since_no_event_says_what_it_costs() -> None:
    base = noised(noise_multiplier=4.0)
    secret = _Secret(**{field.name: getattr(base, field.name) for field in dataclasses.fields(base)})
    channel = SecureChannel(KEYS, SIZE)
    spec = channel.trainer.spec
    plan = Plan(SecureAggregation(secret, PROTOCOL), sampling=PoissonSampling(0.5))
    gathering = SecureGathering(plan.strategy, spec, (), KEYS.witnesses)  # type: ignore[arg-type]  # it is secure
    state = Coordinator.begin(plan, spec, torch.zeros(SIZE), "a-run")
    reserved: list[tuple[Sequence[Mapping[str, Any]], int]] = []
    coordinator = Coordinator(plan, spec, state, gathering=gathering, reserve=lambda *new: reserved.append(new))
    order = coordinator._order(range(COUNT), range(COUNT), 1)
    assert order.again is not None
    with pytest.raises(PrivacyError, match="a second sum of one secret cohort would cost more than a round of its own"):
        order.again()
    assert reserved == []
