"""Who is let into a fleet, who is turned away or must wait, and that both sides are told."""

from __future__ import annotations

import pytest

from fedml_core.handshake import FORMAT, Introduction, Refused, greeting_to_frame
from fedml_core.model import ModelSpec
from fedml_core.wire import Frame
from server.fleet_letters import LinkFailure
from server.reception import Back
from tests.link_double import HELLO, SPEC, Link, assignment, channel_of, introduces, ready, site, told


def test_joining_and_leaving_is_said_aloud() -> None:
    said: list[str] = []
    link = Link({7: introduces(1, "ward-a"), 8: introduces(2)})
    channel = ready(link, said)
    del link.answers[7]
    assert channel.clients(2) == [2]
    assert said == ["client 1 (ward-a) joined", "client 2 joined", "client 1 (ward-a) left"]


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


@pytest.mark.parametrize(("size", "words"), [(5, "cannot take part: the server's model"), (4, "")])
def test_a_client_that_leaves_as_soon_as_it_has_introduced_itself_is_judged_but_not_let_in(
    size: int, words: str
) -> None:
    said: list[str] = []
    link = Link({7: introduces(1, "ward-a", ModelSpec.of_size(size))}, slow=True)
    channel = channel_of(link, said, minimum_clients=0)
    assert channel.clients(1) == []
    del link.answers[7]
    assert channel.clients(1) == []
    link.slow = False
    assert channel.clients(1) == []
    assert [words in line for line in said] == ([True] if words else [])
    assert link.sent() == [(7, "hello")]
