"""The fleet's channel over a link that says what it is told to: who is let in, what comes back, what is forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fedml_core.errors import RunError
from fedml_core.handshake import (
    FORMAT,
    Goodbye,
    Greeting,
    Hello,
    Introduction,
    Refused,
    greeting_from_frame,
    greeting_to_frame,
)
from fedml_core.identity import PublicKeys, Site
from fedml_core.messages import (
    Arrival,
    Assignment,
    EvaluateWork,
    Evaluation,
    Failure,
    Refusal,
    Reply,
    assignment_from_frame,
    assignment_to_frame,
    reply_to_frame,
)
from fedml_core.model import ModelSpec
from fedml_core.update import Update
from fedml_core.wire import Frame
from server.fleet_channel import FleetChannel
from server.fleet_letters import LinkFailure, NodeInfo
from server.reception import Back

SPEC = ModelSpec.of_size(4)
HELLO = Hello("run", 0, SPEC)
WORK = ("train", "evaluate")
Answer = Callable[[int, Frame], Back | None]


@dataclass
class Link:
    """A fleet whose nodes answer by a function each: None keeps a frame for later, see `release`."""

    answers: dict[int, Answer] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    kept: dict[str, tuple[int, Frame]] = field(default_factory=dict)
    back: list[tuple[str, Back]] = field(default_factory=list)
    frames: list[tuple[int, Frame]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    ids: itertools.count[int] = field(default_factory=itertools.count)
    on_poll: Callable[[], object] | None = None

    def nodes(self) -> Mapping[int, NodeInfo]:
        return {node: NodeInfo(None, self.sites.get(node)) for node in self.answers}

    def push(self, frames: Mapping[int, Frame]) -> Mapping[str, int]:
        sent = {f"m{next(self.ids)}": node for node in frames}
        for message_id, node in sent.items():
            frame = frames[node]
            self.frames.append((node, frame))
            answer = self.answers[node](node, frame) if node in self.answers else LinkFailure(node, "unavailable")
            if answer is None:
                self.kept[message_id] = (node, frame)
            else:
                self.back.append((message_id, answer))
        return sent

    def poll(self, timeout_s: float = 0.0) -> list[tuple[str, Back]]:
        if self.on_poll is not None:
            self.on_poll()
        back, self.back = self.back, []
        return back

    def cancel(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            self.cancelled.append(message_id)
            self.kept.pop(message_id, None)

    def sent(self) -> list[tuple[int, str]]:
        """Return node and kind of every frame that was pushed."""
        return [(node, frame.kind) for node, frame in self.frames]

    def asked(self) -> list[int]:
        """Return the nodes that were given work, in order."""
        return sorted(node for node, kind in self.sent() if kind in WORK)

    def release(self, answer: Answer) -> None:
        """Let what was kept be answered now."""
        kept, self.kept = self.kept, {}
        self.back += [(message_id, back) for message_id, (node, frame) in kept.items() if (back := answer(node, frame))]


def introduces(number: int, name: str = "", spec: ModelSpec = SPEC) -> Answer:
    """Return a client that introduces itself, and replies to work by an evaluation of `number` examples."""

    def answer(node: int, frame: Frame) -> Back | None:
        if frame.kind in ("train", "evaluate"):
            return reply_frame(frame, number)
        return greeting_to_frame(Introduction(number, name, spec))

    return answer


def working(number: int, work: Answer) -> Answer:
    """Return a client that introduces itself, and does with work what `work` does."""
    greets = introduces(number)
    return lambda node, frame: greets(node, frame) if frame.kind == "hello" else work(node, frame)


def reply_frame(frame: Frame, number: int, body: Any = None) -> Frame:
    asked = assignment_from_frame(frame)
    done = Evaluation({"examples": float(number)}) if body is None else body
    return reply_to_frame(Reply(asked.run, asked.round, number, asked.fingerprint, done))


def keeps(node: int, frame: Frame) -> None:
    """Answer later, or never."""


def assignment(round_number: int = 1) -> Assignment:
    return Assignment("run", round_number, SPEC.fingerprint, torch.zeros(4), EvaluateWork())


def channel_of(link: Link, said: list[str] | None = None, **options: Any) -> FleetChannel:
    said = [] if said is None else said
    return FleetChannel(link, HELLO, say=said.append, **options)


def ready(link: Link, said: list[str] | None = None) -> FleetChannel:
    """Return a channel that has greeted every node of `link`."""
    channel = channel_of(link, said)
    channel.clients(1)
    return channel


def failures(arrivals: Iterable[Arrival]) -> dict[int, tuple[str, str]]:
    found = {arrival.client: arrival.reply.body for arrival in arrivals}
    return {client: (body.rule, body.reason) for client, body in found.items() if isinstance(body, Failure | Refusal)}


def site(number: int, name: str) -> Site:
    return Site(number, name, PublicKeys(b"", b""))


def told(link: Link, node: int) -> list[Greeting]:
    """Return what the channel told a node, work left out."""
    return [greeting_from_frame(frame) for to, frame in link.frames if to == node and frame.kind not in WORK]


def test_clients_are_numbers_in_order_whatever_the_order_of_their_nodes() -> None:
    channel = ready(Link({7: introduces(12), 8: introduces(3), 9: introduces(5)}))
    assert channel.clients(1) == [3, 5, 12]


def test_every_client_gets_its_work_once_and_its_reply_is_attributed_to_it() -> None:
    link = Link({7: introduces(12), 8: introduces(3)})
    arrivals = list(ready(link).exchange(assignment(), [3, 12], None))
    assert {arrival.client: arrival.reply.body for arrival in arrivals} == {
        3: Evaluation({"examples": 3.0}),
        12: Evaluation({"examples": 12.0}),
    }
    assert all(arrival.size_bytes > 50 for arrival in arrivals)
    assert link.asked() == [7, 8]


def test_an_assignment_is_encoded_once_for_the_whole_cohort() -> None:
    link = Link({node: introduces(node) for node in range(5)})
    list(ready(link).exchange(assignment(), range(5), None))
    assert len({id(frame) for _, frame in link.frames if frame.kind in WORK}) == 1


def test_only_the_cohort_is_asked() -> None:
    link = Link({7: introduces(1), 8: introduces(2)})
    assert [arrival.client for arrival in ready(link).exchange(assignment(), [2], None)] == [2]
    assert link.asked() == [8]


def test_joining_and_leaving_is_said_aloud() -> None:
    said: list[str] = []
    link = Link({7: introduces(1, "ward-a"), 8: introduces(2)})
    channel = ready(link, said)
    del link.answers[7]
    assert channel.clients(2) == [2]
    assert said == ["client 1 (ward-a) joined", "client 2 joined", "client 1 (ward-a) left"]


def test_a_client_that_comes_during_a_round_takes_part_from_the_next() -> None:
    link = Link({7: working(1, keeps)})
    channel = ready(link)
    link.answers[8] = introduces(2)
    link.on_poll = lambda: link.release(introduces(1)) if (8, "hello") in link.sent() else None
    assert [arrival.client for arrival in channel.exchange(assignment(1), [1], None)] == [1]
    assert channel.clients(2) == [1, 2]
    assert link.asked() == [7]


def test_it_waits_for_the_least_number_of_clients_and_says_who_is_there() -> None:
    said: list[str] = []
    link = Link()
    channel = channel_of(link, said, minimum_clients=3)
    arrivals = iter([(7, introduces(5)), (8, introduces(1, "ward-a")), (9, introduces(2))])

    def one_more() -> None:
        link.answers.update(itertools.islice(arrivals, 1))

    link.on_poll = one_more
    assert channel.clients(1) == [1, 2, 5]
    assert [line for line in said if "waiting" in line] == [
        "waiting for clients: 0 of 3",
        "waiting for clients: 1 of 3 (client 5)",
        "waiting for clients: 2 of 3 (ward-a, client 5)",
    ]


def test_too_few_clients_after_the_wait_end_the_run_with_the_remedy() -> None:
    channel = channel_of(Link({7: introduces(1)}), minimum_clients=2, wait_s=0.05)
    expected = r"1 of 2 clients were there after 0.05 s, before round 4; start more, or lower server.minimum_clients"
    with pytest.raises(RunError, match=expected):
        channel.clients(4)


def test_a_second_client_of_the_same_number_waits_aloud_until_the_first_leaves() -> None:
    said: list[str] = []
    link = Link({7: introduces(1, "ward-a"), 8: introduces(1, "ward-b"), 9: introduces(1, "ward-c")})
    channel = ready(link, said)
    assert list(channel.exchange(assignment(), [1], None)) and link.asked() == [7]
    assert (
        "client 1 (ward-b) cannot take part: client 1 (ward-a) is connected and has this number; "
        "it waits until that leaves"
    ) in said
    reason = "another client that is connected has the number 1; give each site an id of its own"
    assert told(link, 8) == [HELLO, Refused(reason, final=False)]
    del link.answers[7]
    channel.clients(2)
    assert channel.clients(2) == [1]
    assert told(link, 8)[-1] == HELLO, "it is greeted again, and so learns that it is taken in"
    assert said[-2:] == ["client 1 (ward-a) left", "client 1 (ward-b) joined"]
    assert Refused(reason, final=False) in told(link, 9)


def test_with_a_roster_the_number_is_the_enrolled_one_and_the_name_too() -> None:
    said: list[str] = []
    channel = ready(Link({7: introduces(4, "king")}, {7: site(4, "ward-a")}), said)
    assert channel.clients(1) == [4]
    assert said[-1] == "client 4 (ward-a) joined"


def test_who_claims_another_number_than_the_enrolled_one_is_refused_aloud() -> None:
    said: list[str] = []
    link = Link({7: introduces(5), 8: introduces(6)}, {7: site(4, "ward-a"), 8: site(6, "ward-b")})
    assert ready(link, said).clients(1) == [6]
    reason = "its key is enrolled for client 4 and its site.toml says id = 5; correct the id"
    assert f"client 4 (ward-a) cannot take part: {reason}" in said
    assert told(link, 7)[-1] == Refused(reason)


def test_a_client_with_another_model_is_refused_with_both_fingerprints_and_the_run_goes_on_without_it() -> None:
    said: list[str] = []
    other = ModelSpec.of_size(5)
    link = Link({7: introduces(1, "ward-a", other), 8: introduces(2)})
    channel = ready(link, said)
    assert channel.clients(1) == [2]
    line = next(line for line in said if "ward-a" in line)
    assert line.startswith("client 1 (ward-a) cannot take part: the server's model ")
    for part in (SPEC.fingerprint, other.fingerprint, "first difference at vector (4,)", "install the same task"):
        assert part in line
    assert isinstance(told(link, 7)[-1], Refused)
    assert [arrival.client for arrival in channel.exchange(assignment(), [2], None)] == [2]


SPEC_TREE = greeting_to_frame(Introduction(1, "x", SPEC)).header
STRANGE = {
    "declines": (greeting_to_frame(Refused("no \x1b[2J way")), "it declines: no ?[2J way"),
    "greets back": (greeting_to_frame(HELLO), "it answered the greeting by a hello"),
    "not a greeting": (Frame("update", "{}"), "not one that this version understands"),
    "not JSON": (Frame("introduction", "{"), "not one that this version understands"),
    "another format": (
        Frame("introduction", SPEC_TREE.replace(f'"format":{FORMAT}', '"format":99')),
        f"the other side speaks format 99 and this side format {FORMAT}",
    ),
    "no model": (Frame("introduction", SPEC_TREE.replace('"parameters"', '"p"')), "not one that this version"),
    "negative": (Frame("introduction", SPEC_TREE.replace('"client":1', '"client":-1')), "not one that this version"),
    "raises": (LinkFailure(7, "client-error", "ZeroDivisionError"), "(client-error, ZeroDivisionError)"),
}


@pytest.mark.parametrize(("answer", "words"), STRANGE.values(), ids=STRANGE)
def test_a_strange_answer_to_the_greeting_costs_that_client_only(answer: Back, words: str) -> None:
    said: list[str] = []
    link = Link({7: lambda node, frame: answer, 8: introduces(2)})
    channel = ready(link, said)
    assert channel.clients(1) == [2]
    assert [line for line in said if words in line and line.isprintable()]
    assert [kind for node, kind in link.sent() if node == 7] == ["hello", "refused"], "it is not greeted for ever"


def test_a_name_that_moves_the_cursor_does_not() -> None:
    said: list[str] = []
    ready(Link({7: introduces(1, "\x1b[2Jward\n" + "a" * 200)}), said)
    joined = said[-1]
    assert joined.isprintable() and len(joined) < 100 and "ward" in joined


LOST = {
    "unavailable": ("lost", "it fell silent or left while it worked"),
    "restarted": ("lost", "its process began anew while it worked"),
    "expired": ("lost", "it never took its work"),
    "incomplete": ("lost", "it left in the middle of its reply"),
    "malformed": ("malformed", "what came back is not a frame"),
}


@pytest.mark.parametrize("reason", LOST)
def test_a_client_that_is_lost_on_the_way_is_attributed_with_what_is_known(reason: Any) -> None:
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, reason)), 8: introduces(2)})
    arrivals = list(ready(link).exchange(assignment(), [1, 2], None))
    assert failures(arrivals) == {1: LOST[reason]}
    lost = next(arrival for arrival in arrivals if arrival.client == 1)
    assert (lost.reply.run, lost.reply.round, lost.reply.client, lost.size_bytes) == ("run", 1, 1, 0)


def test_of_a_client_whose_process_raised_only_the_class_is_told() -> None:
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, "client-error", "MemoryError"))})
    arrivals = ready(link).exchange(assignment(), [1], None)
    assert failures(arrivals) == {1: ("crashed", "its process raised MemoryError; its own log says more")}


@pytest.mark.parametrize("failure", [("restarted", ""), ("client-error", "NotGreetedError")], ids=lambda row: row[0])
def test_a_client_that_began_anew_is_greeted_again_and_is_there_in_the_next_round(failure: Any) -> None:
    said: list[str] = []
    link = Link({7: working(1, lambda node, frame: LinkFailure(node, *failure))})
    channel = ready(link, said)
    (body,) = failures(channel.exchange(assignment(), [1], None)).values()
    assert body[0] == "lost" and "began anew" in body[1]
    link.answers[7] = introduces(1)
    assert channel.clients(2) == [1]
    assert said[-2:] == ["client 1 began anew", "client 1 joined"]


def test_a_client_that_left_before_it_was_asked_is_attributed_too() -> None:
    link = Link({7: introduces(1), 8: introduces(2)})
    channel = ready(link)
    del link.answers[7]
    assert channel.clients(1) == [2]
    assert failures(channel.exchange(assignment(), [1, 2], None)) == {1: ("lost", "it left before it was asked")}


def test_a_reply_that_is_none_is_excluded_as_malformed_and_its_bytes_count() -> None:
    sums = reply_frame(assignment_frame(), 1).header.replace('{"examples":1.0}', "[1]")
    assert "[1]" in sums
    for frame in (Frame("evaluation", "{"), Frame("evaluation", "{}"), Frame("greeting", "[]"), Frame("update", sums)):
        link = Link({7: working(1, lambda node, asked, frame=frame: frame), 8: introduces(2)})  # type: ignore[misc]
        arrivals = list(ready(link).exchange(assignment(), [1, 2], None))
        assert {client: rule for client, (rule, _) in failures(arrivals).items()} == {1: "malformed"}
        assert sum(arrival.size_bytes for arrival in arrivals if arrival.client == 1) == frame.size_bytes


def test_a_clients_refusal_passes_and_does_nothing_to_a_terminal() -> None:
    refusal = Refusal("floor", "noise 0.3 is below\x1b[31m 0.8")
    link = Link({7: working(1, lambda node, frame: reply_frame(frame, 1, refusal))})
    assert failures(ready(link).exchange(assignment(), [1], None)) == {1: ("floor", "noise 0.3 is below?[31m 0.8")}


def test_an_updates_numbers_arrive_exactly() -> None:
    values = torch.tensor([0.1, -0.0, 3e-39, 7.0])
    link = Link({7: working(1, lambda node, frame: reply_frame(frame, 1, Update.of(values, 5.0, examples=5.0)))})
    (arrival,) = ready(link).exchange(assignment(), [1], None)
    assert isinstance(arrival.reply.body, Update)
    assert torch.equal(arrival.reply.body.values, values)
    assert float(arrival.reply.body.weight) == 5.0


def test_the_deadline_ends_an_exchange_and_cancels_what_is_under_way() -> None:
    link = Link({7: introduces(1), 8: working(2, keeps)})
    channel = ready(link)
    assert [arrival.client for arrival in channel.exchange(assignment(), [1, 2], 0.05)] == [1]
    assert len(link.cancelled) == 1 and not link.kept


def test_an_exchange_that_is_left_early_cancels_what_is_under_way() -> None:
    link = Link({7: introduces(1), 8: working(2, keeps)})
    exchange = iter(ready(link).exchange(assignment(), [1, 2], None))
    assert next(exchange).client == 1
    exchange.close()  # type: ignore[attr-defined]  # a generator
    assert len(link.cancelled) == 1 and not link.kept


def test_a_reply_to_an_older_exchange_never_reaches_the_next() -> None:
    link = Link({7: working(1, keeps)})
    channel = ready(link)
    first = list(channel.exchange(assignment(1), [1], 0.05))
    late = [(message_id, reply_frame(assignment_frame(), 1)) for message_id in link.cancelled]
    link.answers[7] = working(1, lambda node, frame: reply_frame(frame, 1))
    link.back += late
    second = list(channel.exchange(assignment(2), [1], None))
    assert first == [] and len(late) == 1
    assert [(arrival.client, arrival.reply.round) for arrival in second] == [(1, 2)]


def test_a_farewell_reaches_everybody_who_is_connected_and_names_who_did_not_hear_it() -> None:
    said: list[str] = []
    link = Link({7: introduces(1), 8: introduces(1), 9: introduces(2, "ward-b")})
    channel = ready(link, said)
    link.answers[9] = keeps
    channel.farewell("the run is done", 0.05)
    for node in (7, 8, 9):
        assert told(link, node)[-1] == Goodbye("the run is done")
    assert said[-1] == "client 2 (ward-b) still works and does not know yet that the run is over"
    assert len(link.cancelled) == 1


def test_on_turn_is_called_while_it_waits() -> None:
    link = Link()

    def arrive() -> None:
        link.answers[7] = introduces(1)

    assert channel_of(link, on_turn=arrive).clients(1) == [1]


def assignment_frame() -> Frame:
    return assignment_to_frame(assignment())
