"""What a run's rounds cost, in the coordinator: counted before anybody is asked, and never given back."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.message_frames import assignment_to_frame
from fedml_core.messages import Assignment, TrainWork
from fedml_core.model import ModelSpec
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.correlated import BandedNoise, TreeNoise
from fedml_core.privacy.events import canonical
from fedml_core.transform import Transform, chain
from fedml_core.weighting import Uniform, Weigh
from server import (
    Coordinator,
    EveryClient,
    FixedSampling,
    MinimumSeparation,
    Plan,
    PoissonSampling,
    RoundReport,
    Sampling,
)
from server.books import charged, claim_of
from server.checkpoint import FILE_NAME, RunState, load_checkpoint, save_checkpoint
from server.history import RunFolder
from server.plan import EvaluationPlan
from strategies import CentralDP, FedAvg, LocalDP, Strategy
from tests.doubles import PullChannel, with_values

SIZE, CLIENTS = 3, 20
POISSON = PoissonSampling(0.3)
EVENLY = FedAvg(weighting=Uniform())
NO_EVALUATION = EvaluationPlan(every=0, server=False)


def central(**changes: Any) -> CentralDP:
    full: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 2.0, "expected_cohort": 6.0, "delta": 1e-5}
    return CentralDP(EVENLY, **{**full, **changes})


def plan_for(strategy: Strategy, sampling: Sampling = POISSON, **changes: Any) -> Plan:
    return Plan(strategy, sampling=sampling, evaluation=NO_EVALUATION, **changes)


def begin(plan: Plan, channel: PullChannel, **changes: Any) -> Coordinator:
    spec = channel.trainer.spec
    return Coordinator(plan, spec, Coordinator.begin(plan, spec, torch.zeros(spec.size), "run"), **changes)


def run(plan: Plan, rounds: int = 4, channel: PullChannel | None = None) -> tuple[list[RoundReport], Coordinator]:
    channel = channel or PullChannel(CLIENTS, SIZE)
    coordinator = begin(plan, channel)
    return list(coordinator.rounds(channel, rounds)), coordinator


@pytest.mark.parametrize(
    ("sampling", "event", "adjacency"),
    [
        (PoissonSampling(0.3), {"name": "poisson", "sampling_probability": 0.3}, "add-or-remove-one"),
        (FixedSampling(5), {"name": "fixed-size", "population": CLIENTS, "sample": 5}, "replace-one"),
        (FixedSampling(50), None, "replace-one"),
        (EveryClient(), None, "add-or-remove-one"),
        (MinimumSeparation(4), None, "add-or-remove-one"),
    ],
)
def test_every_report_says_what_the_rounds_so_far_cost(
    sampling: Sampling, event: Mapping[str, Any] | None, adjacency: str
) -> None:
    reports, coordinator = run(plan_for(central(), sampling))
    inner = {"name": "composed", "events": [{"name": "gaussian", "noise_multiplier": 2.0}]}
    one = inner if event is None else {**event, "event": inner}
    for number, report in enumerate(reports, start=1):
        exact = epsilon_of([one] * number, delta=1e-5, unit="client", adjacency=adjacency)
        assert report.epsilon is not None and report.privacy is not None
        # Coarser than the finest accountant, and never below it.
        assert exact.epsilon * (1 - 1e-6) <= report.epsilon <= exact.epsilon * 1.003
        assert report.privacy["epsilon"] == report.epsilon
        told = {key: report.privacy[key] for key in ("delta", "unit", "adjacency", "sampling")}
        assert told == {"delta": 1e-5, "unit": "client", "adjacency": adjacency, "sampling": exact.sampling}
    assert len(coordinator.state.events) == 1
    assert RoundReport.from_json(reports[-1].to_json()).privacy == reports[-1].privacy


def test_a_run_without_privacy_says_nothing_and_has_no_secret() -> None:
    reports, coordinator = run(plan_for(EVENLY, FixedSampling(5)))
    assert [(report.epsilon, report.privacy) for report in reports] == [(None, None)] * 4
    assert (coordinator.state.secret, coordinator.state.events) == (None, ())


def test_rounds_in_which_nobody_comes_are_noised_and_released() -> None:
    reports, coordinator = run(plan_for(central(), PoissonSampling(1e-9)))
    assert [(report.status, report.cohort) for report in reports] == [("ok", 0)] * 4
    assert float(coordinator.state.parameters.abs().min()) > 0
    reports, coordinator = run(plan_for(central()), channel=PullChannel(0, SIZE))
    assert [report.status for report in reports] == ["ok"] * 4
    assert float(coordinator.state.parameters.abs().min()) > 0


def test_a_client_that_does_not_clip_is_excluded_and_named() -> None:
    channel = PullChannel(CLIENTS, SIZE, {3: with_values(torch.full((SIZE,), 50.0))})
    reports, _ = run(plan_for(central(), EveryClient()), 1, channel)
    assert [(row.client, row.rule) for row in reports[0].excluded] == [(3, "norm")]


def test_a_round_is_counted_before_anybody_is_asked_and_stays_counted() -> None:
    class Failing(PullChannel):
        def exchange(self, assignment: Assignment, cohort: Sequence[int], timeout_s: float | None) -> Any:
            assert all(new for new, _ in reserved)
            raise KeyboardInterrupt

    reserved: list[tuple[Sequence[Mapping[str, Any]], int]] = []
    channel = Failing(CLIENTS, SIZE)
    coordinator = begin(plan_for(central(), EveryClient()), channel, reserve=lambda *new: reserved.append(new))
    for attempt in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            next(coordinator.rounds(channel, 5))
        assert len(reserved) == attempt and reserved[-1][1] == 1
        assert coordinator.state.events[0]["count"] == attempt
    assert coordinator.state.round == 0


def test_a_ledger_that_says_no_stops_the_round_before_it_begins() -> None:
    def refuse(events: Sequence[Mapping[str, Any]], round_number: int) -> None:
        raise PrivacyError("the budget is spent")

    channel = PullChannel(CLIENTS, SIZE)
    coordinator = begin(plan_for(central(), EveryClient()), channel, reserve=refuse)
    with pytest.raises(PrivacyError, match="the budget is spent"):
        next(coordinator.rounds(channel, 5))
    assert channel.asked == []


def test_a_void_round_still_costs() -> None:
    nan = with_values(torch.full((SIZE,), float("nan")))
    plan = plan_for(LocalDP(EVENLY, 1.0, 2.0, 1e-5), EveryClient())
    channel = PullChannel(2, SIZE, {0: nan, 1: nan})
    coordinator = begin(plan, channel)
    first = next(coordinator.rounds(channel, 2))
    assert first.status == "void" and first.epsilon == pytest.approx(2.0, rel=1e-6)


def test_cohorts_come_from_a_secret_that_is_never_sent_and_a_resumed_run_has_the_same(tmp_path: Path) -> None:
    plan = plan_for(central(), seed=5)
    channel, again = PullChannel(CLIENTS, SIZE), PullChannel(CLIENTS, SIZE)
    coordinator, other = begin(plan, channel), begin(plan, again)
    secret = coordinator.state.secret
    assert secret is not None and len(bytes.fromhex(secret)) == 32 and secret != other.state.secret
    assert secret not in repr(coordinator.state)
    save_checkpoint(tmp_path, coordinator.state, plan)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    resumed = Coordinator(plan, channel.trainer.spec, load_checkpoint(tmp_path, plan, channel.trainer.spec.fingerprint))
    cohorts = [[each._cohort(range(500), number) for number in (1, 2, 3)] for each in (coordinator, resumed, other)]
    assert cohorts[0] == cohorts[1] != cohorts[2]
    public = [plan.sampling.cohort(range(500), number, plan.seed) for number in (1, 2, 3)]
    assert public not in cohorts
    assignment = coordinator._order(range(CLIENTS), [1], 1).assignment
    assert isinstance(assignment.work, TrainWork) and assignment.work.seed == 5
    frame = assignment_to_frame(assignment)
    assert secret not in frame.header and str(int(secret, 16)) not in frame.header


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    plan = plan_for(central())
    channel = PullChannel(CLIENTS, SIZE)
    whole, _ = run(plan, 4)
    coordinator = begin(plan, channel)
    for _ in coordinator.rounds(channel, 2):
        save_checkpoint(tmp_path, coordinator.state, plan)
    resumed = Coordinator(plan, channel.trainer.spec, load_checkpoint(tmp_path, plan, channel.trainer.spec.fingerprint))
    reports = list(resumed.rounds(channel, 4))
    assert [report.epsilon for report in reports] == [report.epsilon for report in whole[2:]]


class Killed(BaseException):
    """What no handler of ours catches, as no handler catches a kill."""


def test_a_round_that_a_crash_cut_off_stays_counted_where_the_server_saw_what_left(tmp_path: Path) -> None:
    plan = plan_for(LocalDP(FedAvg(weighting=Uniform()), clip_norm=1.0, epsilon=2.0, delta=1e-6), EveryClient())
    folder, channel = RunFolder(tmp_path, plan), PullChannel(CLIENTS, SIZE)
    spec = channel.trainer.spec
    fresh = lambda: Coordinator.begin(plan, spec, torch.zeros(spec.size), "run")  # noqa: E731 - given to `begin`

    def exchange(*_: object) -> Any:
        raise Killed
        yield

    started = folder.begin(fresh, spec, resume=False, overwrite=False)
    dying = PullChannel(CLIENTS, SIZE)
    dying.exchange = exchange  # type: ignore[assignment, method-assign]
    with pytest.raises(Killed):
        next(Coordinator(plan, spec, started, keep=folder.keep).rounds(dying, 2))
    resumed = Coordinator(plan, spec, folder.begin(fresh, spec, resume=True, overwrite=False), keep=folder.keep)
    first, second = resumed.rounds(channel, 2)
    (event,) = {canonical(each["event"]) for each in resumed.state.events}
    assert [each["count"] for each in resumed.state.events] == [3] and event
    assert (first.round, second.round) == (1, 2)
    assert first.epsilon == pytest.approx(one_after(plan, 2)) and second.epsilon == pytest.approx(one_after(plan, 3))


def one_after(plan: Plan, rounds: int) -> float:
    event = plan.strategy.pipeline().event()
    terms = plan.strategy.privacy()
    assert event is not None and terms is not None
    folded = [{"name": "repeated", "count": rounds, "event": event}]
    return claim_of(folded, terms, plan.sampling).epsilon


def test_a_state_without_a_secret_claims_no_amplification() -> None:
    channel = PullChannel(CLIENTS, SIZE)
    coordinator = begin(plan_for(central()), channel)
    coordinator.state = dataclasses.replace(coordinator.state, secret=None)
    with pytest.raises(PrivacyError, match="the run's state has no secret to sample by, so cohorts could be foretold"):
        next(coordinator.rounds(channel, 1))
    assert channel.asked == []


@pytest.mark.parametrize(
    "noise", [TreeNoise(rounds=6, restart_every=3), BandedNoise(rounds=6, bands=3)], ids=["tree", "banded"]
)
def test_correlated_noise_is_charged_once_for_the_whole_run(noise: TreeNoise | BandedNoise) -> None:
    strategy = central(noise=noise)
    reports, coordinator = run(plan_for(strategy, MinimumSeparation(3)), 6)
    event = strategy.pipeline().event()
    assert event is not None
    whole = epsilon_of([event], delta=1e-5, unit="client", adjacency="replace-special")
    assert [report.epsilon for report in reports] == [pytest.approx(whole.epsilon, rel=1e-3)] * 6
    assert coordinator.state.events == [{"name": "repeated", "count": 1, "event": event}]
    with pytest.raises(PrivacyError, match="the noise is for a run of 6 rounds, and 7 were asked for"):
        next(begin(plan_for(strategy, MinimumSeparation(3)), PullChannel(2, SIZE)).rounds(PullChannel(2, SIZE), 7))


@pytest.mark.parametrize("sampling", [EveryClient(), PoissonSampling(0.3), FixedSampling(3), MinimumSeparation(2)])
def test_correlated_noise_needs_clients_that_stay_away(sampling: Sampling) -> None:
    with pytest.raises(PrivacyError, match=r"clients that stay away for 3 rounds.*sample with MinimumSeparation\(3\)"):
        plan_for(central(noise=TreeNoise(rounds=6, restart_every=3)), sampling)


def test_a_minimum_of_replies_would_tell_how_many_came() -> None:
    with pytest.raises(ConfigError, match="minimum_replies must be 1 where noise is to hide who takes part, got 4"):
        plan_for(central(), minimum_replies=4)


def test_local_noise_is_not_amplified_by_sampling_that_the_server_sees() -> None:
    reports, _ = run(plan_for(LocalDP(EVENLY, 1.0, 2.0, 1e-5), PoissonSampling(0.3), seed=1), 2)
    assert reports[0].privacy is not None
    assert (reports[0].privacy["sampling"], reports[0].privacy["adjacency"]) == ("none", "replace-one")
    assert reports[0].epsilon == pytest.approx(2.0, rel=1e-6)


def test_a_strategy_that_claims_privacy_without_an_event_is_stopped() -> None:
    @dataclasses.dataclass(frozen=True)
    class _Silent(CentralDP):
        def pipeline(self) -> Transform:
            return chain(Weigh(Uniform()), ClipByNorm(1.0))

    channel = PullChannel(CLIENTS, SIZE)
    coordinator = begin(plan_for(_Silent(EVENLY, 1.0, 1.0, 5.0, 1e-5)), channel)
    with pytest.raises(PrivacyError, match="_Silent claims privacy and reports no event"):
        next(coordinator.rounds(channel, 1))
    assert channel.asked == []


def test_a_checkpoint_without_secrets_can_be_read_by_others(tmp_path: Path) -> None:
    plan = plan_for(EVENLY)
    spec = ModelSpec.of_size(SIZE)
    state = RunState("run", spec.fingerprint, torch.zeros(SIZE), EVENLY.init(spec))
    save_checkpoint(tmp_path, state, plan)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o644


def test_a_hundred_rounds_of_secret_sampling_cost_seven_and_not_ninety() -> None:
    strategy, sampling = central(noise_multiplier=1.0), PoissonSampling(0.1)
    events: Sequence[Mapping[str, Any]] = ()
    for _ in range(100):
        events, _ = charged(events, strategy, sampling, 1000)
    assert len(events) == 1
    assert claim_of(events, strategy.privacy(), sampling).epsilon == pytest.approx(7.0466, rel=1e-3)
    events = ()
    for _ in range(100):
        events, _ = charged(events, strategy, EveryClient(), 1000)
    assert claim_of(events, strategy.privacy(), EveryClient()).epsilon == pytest.approx(91.817, rel=1e-3)
