"""What a client of an assisted sum refuses in each role, and what is left of it afterwards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.replay import ReplayCounter
from clients.secagg import SecureMember
from clients.secure_policy import CohortFloor
from clients.site_standing import unsigned
from clients.standing import Standing
from fedml_core.binding import binding_of
from fedml_core.config import SecureAggregationTable
from fedml_core.errors import RefusalError, SecureAggregationError, TaskError
from fedml_core.messages import Assignment, SecureAnswer, SecureWork, TrainWork
from fedml_core.ring import encoding_from_table
from fedml_core.secagg.assistance import Assistance
from fedml_core.secagg.assisted_server import AssistedServer
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.phases import AssistedPhase
from fedml_core.training import Training
from fedml_core.transform import Chain
from fedml_core.update import Update
from simulations.virtual_sites import AnySite
from tests.secure_cases import DIGEST, Keys, RememberedAttempts

SIZE = 7
KEYS = Keys(4)
MEANING = {"clip": 1.0, "clients": 4, "max_weight": 10, "scalars": [["count", "examples", 100]]}
PARAMETERS = Parameters(
    run="a-run",
    round=1,
    attempt=7,
    length=encoding_from_table(MEANING, 32).length(SIZE),
    bits=32,
    encoding=Assistance((0, 1, 2), 1).within(MEANING),
    minimum=3,
    corrupt_share=0.1,
    dropout_share=0.0,
    roster=DIGEST,
)
WORK = TrainWork(Training(batch_size=4), Chain(), {}, seed=3)


def member(number: int = 0, **changes: Any) -> SecureMember:
    standing = Standing(number, KEYS.roster, DIGEST, KEYS.private[number].sign, RememberedAttempts(), AnySite())
    return SecureMember(
        dataclasses.replace(standing, **changes),
        lambda assignment: Update.of(torch.ones(SIZE), 1.0, examples=1.0),
    )


def ask(one: SecureMember, stage: str, parts: dict[str, bytes], round_number: int = 1) -> SecureAnswer:
    work = SecureWork(stage, parts, WORK if stage == "contribute" else None)
    parameters = torch.zeros(SIZE if stage == "contribute" else 0)
    return one.answer(Assignment("a-run", round_number, "f", parameters, work), work)


class Sum:
    """A server and the assistants 0, 1 and 2, up to the panel."""

    def __init__(self, parameters: Parameters = PARAMETERS, members: dict[int, SecureMember] | None = None) -> None:
        self.parameters = parameters
        self.members = members or {number: member(number) for number in range(4)}
        self.server = AssistedServer(parameters, range(4), KEYS.roster)
        self.context = {"context": parameters.context}
        self.offer = {**self.context, "parameters": parameters.to_text().encode()}

    def advertise(self) -> Sum:
        for one in (0, 1, 2):
            answer = ask(self.members[one], "assist-advertise", self.offer, self.parameters.round)
            self.server.receive_advert(one, answer.parts["advert"])
        base = Assignment("a-run", self.parameters.round, "f", torch.zeros(SIZE), WORK)
        panel = self.server.close_adverts(binding_of(base))
        self.offer["panel"] = panel.to_bytes
        return self

    def contribute(self) -> Sum:
        for one in range(4):
            answer = ask(self.members[one], "contribute", self.offer, self.parameters.round)
            assert answer.vector is not None
            self.server.receive_contribution(one, answer.parts["contribution"], answer.vector)
        return self

    def gather(self) -> Sum:
        for one in (0, 1, 2):
            answer = ask(self.members[one], "assist-gather", self.roundup(one), self.parameters.round)
            self.server.receive_gathered(one, answer.parts["gathered"])
        return self

    def roundup(self, one: int) -> dict[str, bytes]:
        given = {"panel": self.offer["panel"], "binding": self.server.binding}
        return {**self.context, **given, "roundup": self.server.roundup(one)}


def test_a_floor_that_says_no_is_heard_in_both_roles_before_any_key_is_made() -> None:
    """a server that asks for less than the site's own floor is refused before any key is made, in both roles."""
    case = Sum().advertise()
    floor = CohortFloor(SecureAggregationTable(minimum_cohort=5))
    for stage in ("contribute", "assist-advertise"):
        counter = RememberedAttempts()
        strict = member(floor=floor, counter=counter)
        with pytest.raises(RefusalError, match="minimum_cohort is 5"):
            ask(strict, stage, case.offer)
        assert not strict.busy and counter.last == {}


@pytest.mark.parametrize("stage", ["contribute", "assist-advertise"])
def test_a_sites_own_threshold_counts_the_assistants_that_open_masks(stage: str) -> None:
    case = Sum().advertise()
    with pytest.raises(RefusalError, match="minimum_threshold is 3") as refused:
        ask(member(floor=CohortFloor(SecureAggregationTable(minimum_threshold=3))), stage, case.offer)
    assert refused.value.rule == "minimum_threshold"
    ask(member(floor=CohortFloor(SecureAggregationTable(minimum_threshold=2))), stage, case.offer)


def test_a_site_contributes_to_no_sum_whose_masks_others_than_its_own_assistants_would_take_off() -> None:
    # Guarantees: "where the site.toml lists assistants, it contributes to no one-shot sum whose masks anybody else
    # would take off."
    case, counter = Sum().advertise(), RememberedAttempts()
    picky = member(floor=CohortFloor(SecureAggregationTable(assistants=[2, 0, 3])), counter=counter)
    with pytest.raises(RefusalError) as refused:
        ask(picky, "contribute", case.offer)
    assert (refused.value.rule, str(refused.value)) == (
        "assistants",
        "the server names the assistants 0, 1, 2, this site's assistants are 0, 2, 3; it must do without 1",
    )
    assert not picky.busy and counter.last == {}
    content = member(floor=CohortFloor(SecureAggregationTable(assistants=[3, 2, 1, 0])))
    assert ask(content, "contribute", case.offer).vector is not None


def test_whom_a_site_trusts_says_nothing_about_sums_that_it_only_assists_in() -> None:
    floor = CohortFloor(SecureAggregationTable(assistants=[]))
    assert "advert" in ask(member(floor=floor), "assist-advertise", Sum().offer).parts
    with pytest.raises(RefusalError, match="this site's assistants are none; it must do without 0, 1, 2"):
        floor.check_assistants((0, 1, 2))


def test_a_site_without_an_operator_takes_part_in_semi_honest_sums_only_if_it_says_so() -> None:
    curious = dataclasses.replace(PARAMETERS, active=False, roster="")
    nobody: dict[str, Any] = {"roster": {}, "digest": "", "sign": unsigned}
    willing = CohortFloor(SecureAggregationTable(allow_semi_honest=True))
    members = {number: member(number, floor=willing, **nobody) for number in range(4)}
    case = Sum(curious, members).advertise().contribute().gather()
    assert len(case.server.contributions) == 4
    with pytest.raises(RefusalError, match="semi-honest"):
        ask(member(floor=CohortFloor(SecureAggregationTable()), **nobody), "contribute", case.offer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "b-run"}, "another run"),
        ({"round": 2}, "another round"),
        ({"roster": "cd" * 32}, "ask the operator"),
        ({"encoding": MEANING}, "no assistants"),
        ({"encoding": Assistance((1, 2, 3), 1).within(MEANING)}, "no assistant of this sum"),
    ],
)
def test_parameters_that_are_not_this_sums_make_no_assistant(change: dict[str, Any], words: str) -> None:
    other = dataclasses.replace(PARAMETERS, **change)
    with pytest.raises((SecureAggregationError, RefusalError), match=words):
        ask(member(), "assist-advertise", {"context": other.context, "parameters": other.to_text().encode()})


def test_parameters_of_another_context_are_refused_in_both_roles() -> None:
    case = Sum().advertise()
    for stage in ("contribute", "assist-advertise"):
        with pytest.raises(SecureAggregationError, match="another session"):
            ask(member(), stage, {**case.offer, "context": bytes(32)})


def test_an_encoding_that_this_version_does_not_know_is_refused() -> None:
    odd = dataclasses.replace(PARAMETERS, encoding=Assistance((0, 1, 2), 1).within({**MEANING, "more": 1}))
    with pytest.raises(SecureAggregationError, match="does not know"):
        ask(member(), "contribute", Sum(odd).advertise().offer)


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("contribute", {"parameters": PARAMETERS.to_text().encode()}),
        ("assist-gather", {"panel": b"", "binding": b"", "roundup": b""}),
        ("assist-witness", {"contributors": b""}),
        ("assist-answer", {"request": b""}),
        ("assist-answer", {}),
    ],
)
def test_an_exchange_out_of_order_or_without_its_parts_is_an_error(stage: str, parts: dict[str, bytes]) -> None:
    case = Sum()
    with pytest.raises(SecureAggregationError):
        ask(member(), stage, {**case.context, **parts})
    begun = member()
    ask(begun, "assist-advertise", case.offer)
    with pytest.raises(SecureAggregationError):
        ask(begun, stage, {**case.context, **parts})


def test_training_that_fails_ends_the_contribution_and_not_the_assistance() -> None:
    case = Sum().advertise()

    def fail(assignment: Assignment) -> Update:
        raise TaskError("the loader failed")

    one = case.members[0]
    one.assisted._train = fail
    with pytest.raises(TaskError):
        ask(one, "contribute", case.offer)
    assert not one.assisted.contributes(PARAMETERS.context) and one.busy


def test_a_new_attempt_wipes_the_assistance_before() -> None:
    case = Sum().advertise()
    before = case.members[1].assisted._assisting[PARAMETERS.context].session
    later = Sum(dataclasses.replace(PARAMETERS, attempt=8), case.members).advertise()
    assert before.phase is AssistedPhase.OVER and len(later.members[1].assisted._assisting) == 1


def test_an_assistant_gathers_for_one_panel_and_one_piece_of_work() -> None:
    case = Sum().advertise().contribute().gather()
    again = case.roundup(0)
    with pytest.raises(SecureAggregationError, match="another one"):
        ask(case.members[0], "assist-gather", {**again, "binding": bytes(32)})
    assert ask(case.members[1], "assist-gather", case.roundup(1)).parts["gathered"]
    with pytest.raises(SecureAggregationError, match="32 bytes"):
        fresh = Sum(dataclasses.replace(PARAMETERS, attempt=8), case.members).advertise()
        ask(case.members[0], "assist-gather", {**fresh.roundup(0), "binding": b"short"})


def test_an_exchange_of_another_round_ends_the_assistance() -> None:
    case = Sum().advertise().contribute()
    with pytest.raises(SecureAggregationError, match="another round"):
        ask(case.members[0], "assist-gather", case.roundup(0), round_number=2)
    assert case.members[0].assisted._assisting[PARAMETERS.context].session.phase is AssistedPhase.OVER


def test_contributors_are_signed_once_in_a_round_by_what_is_on_the_disk(tmp_path: Path) -> None:
    """contributors are signed once in a round, in whatever process: the very counter of a site, in a file."""

    def site(number: int) -> SecureMember:
        counter = ReplayCounter(tmp_path / f"replay-{number}.json")
        return member(number, counter=counter)

    def sign(attempt: int, round_number: int) -> None:
        parameters = dataclasses.replace(PARAMETERS, attempt=attempt, round=round_number)
        case = Sum(parameters, {number: site(number) for number in range(4)}).advertise().contribute().gather()
        named = {**case.context, "contributors": case.server.close_contributions()}
        ask(case.members[0], "assist-witness", named, round_number)

    sign(attempt=7, round_number=1)
    with pytest.raises(RefusalError) as refused:
        sign(attempt=8, round_number=1)
    assert refused.value.rule == "replay"
    sign(attempt=9, round_number=2)
    counter = ReplayCounter(tmp_path / "replay-0.json")
    assert counter.last("a-run") == counter.last("a-run/assistant") == (2, 9)
    assert counter.last("a-run/signed") == (2, 2)


def test_a_round_that_is_tried_too_often_is_refused_in_each_role_by_itself() -> None:
    floor = CohortFloor(SecureAggregationTable(maximum_attempts=2))
    members = {number: member(number, floor=floor) for number in range(4)}
    for attempt in (7, 8):
        Sum(dataclasses.replace(PARAMETERS, attempt=attempt), members).advertise().contribute()
    with pytest.raises(RefusalError, match="maximum_attempts is 2"):
        Sum(dataclasses.replace(PARAMETERS, attempt=9), members).advertise()


def test_a_sites_policy_is_told_the_fewest_honest_clients_of_the_sum() -> None:
    quarter = dataclasses.replace(PARAMETERS, corrupt_share=0.25)
    case = Sum(quarter).advertise()
    one = case.members[3]
    work = SecureWork("contribute", case.offer, WORK)
    one.assisted.open(Assignment("a-run", 1, "f", torch.zeros(SIZE), work), case.offer)
    # One of the four that there is room for may collude, and three are the minimum.
    assert one.sum(quarter.context).honest == 2
