"""What a transcript says is checked: an honest one passes, and a change of any leaf is found or named as unchecked."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from fedml_core.secagg import transcript_assisted, transcript_secagg
from fedml_core.secagg.parameters import Parameters
from fedml_core.secagg.transcript import Finding, Verdict, check, record
from fedml_core.secagg.unmasked import UnmaskedServerSession
from tests.fedml_core.secagg.assisted_cases import Assisted
from tests.fedml_core.secagg.transcript_cases import (
    KEYS,
    ROSTER,
    STAGES,
    Path,
    Transcript,
    assisted,
    leaves,
    others,
    secagg,
    with_leaf,
    without,
)

LOST = {"nothing": {4}, "shares": {3}}


def failures(transcript: Any, roster: Any = ROSTER) -> list[Finding]:
    return [one for one in check(transcript, roster) if one.verdict is Verdict.FAILED]


def notes(transcript: Any, roster: Any = ROSTER) -> str:
    return " | ".join(one.said for one in check(transcript, roster) if one.verdict is Verdict.NOT_CHECKED)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("gone", [{}, LOST, {"confirmed": {0}}])
def test_an_honest_attempt_passes(gone: dict[str, set[int]], active: bool) -> None:
    # whatever is checked, the outcome is a list of findings that say in words what was checked.
    made = secagg(8, gone=gone, active=active)
    findings = check(made, ROSTER)
    assert [one for one in findings if one.verdict is Verdict.FAILED] == []
    assert sum(one.verdict is Verdict.PASSED for one in findings) >= 15
    assert all(one.said and one.what for one in findings)
    assert ("semi-honest" in notes(made)) is not active


def test_an_honest_attempt_in_a_sparse_graph_passes() -> None:
    made = secagg(110, gone={"adverts": {3}, "shares": {7, 8}}, corrupt_share=0.05)
    assert failures(made) == []
    assert made["degree"] < 109


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("until", STAGES)
def test_an_attempt_that_ended_early_passes_and_has_no_sum(until: str, active: bool) -> None:
    made = secagg(until=until, active=active)
    if until != "sum":
        assert made["result"] is None
    assert failures(made) == []
    assert failures(made, None) == []
    assert ("no roster was given" in notes(made, None)) is active


@pytest.mark.parametrize("options", [{}, {"active": False}, {"each": 2}, {"assistants": 5, "threshold": 2, "lying": 1}])
def test_an_honest_assisted_sum_passes(options: dict[str, Any]) -> None:
    made, roster = assisted(**options)
    assert failures(made, roster) == []
    assert failures(made, None) == []
    assert sum(one.verdict is Verdict.PASSED for one in check(made, roster)) >= 12


def test_an_assisted_sum_that_ended_early_passes() -> None:
    case = Assisted()
    assert failures(json.loads(json.dumps(record(case.server))), case.roster) == []
    case.server.receive_advert(100, case.assistants[100].advertise())
    assert failures(json.loads(json.dumps(record(case.server))), case.roster) == []
    case = Assisted()
    case.advertise()
    for step in (case.contribute, case.gather, case.witness, case.answer):
        assert failures(json.loads(json.dumps(record(case.server))), case.roster) == []
        step()
    made = json.loads(json.dumps(record(case.server)))
    assert failures(made, case.roster) == []
    assert "all masks were summed up, so whether there is one is the server's word" in notes(made, case.roster)


def trusted(path: Path, names: tuple[str, ...]) -> bool:
    """Say whether a place is within what is documented as the server's word."""
    fields = [step for step in path if isinstance(step, str)]
    return any(fields[: len(name)] == name for name in (named.split(".") for named in names))


@pytest.mark.parametrize("gone", [{}, LOST])
def test_a_change_of_any_leaf_of_a_secagg_transcript_is_found(gone: dict[str, set[int]]) -> None:
    # a transcript that was changed anywhere fails, but for the fields that are named as the server's word.
    # signatures and everything that is computed from signed values are checked; who sent shares, who unmasked, who
    # complained and lied, and the digest of the sum are the server's word.
    changed(secagg(6, gone=gone), ROSTER, transcript_secagg.ON_TRUST)


@pytest.mark.parametrize("options", [{}, {"assistants": 4, "threshold": 2}])
def test_a_change_of_any_leaf_of_an_assisted_transcript_is_found(options: dict[str, Any]) -> None:
    # signatures and everything that is computed from signed values are checked; who was asked, who answered, who
    # refused whom, and the digest of the sum are the server's word.
    made, roster = assisted(3, **options)
    changed(made, roster, transcript_assisted.ON_TRUST)


def changed(transcript: Transcript, roster: dict[int, bytes], on_trust: tuple[str, ...]) -> None:
    unnoticed, spoilt = set(), 0
    for path, value in leaves(transcript):
        for other in others(value):
            spoilt += 1
            if not failures(with_leaf(transcript, path, other), roster):
                unnoticed.add(path)
    assert spoilt > 300
    assert {path for path in unnoticed if not trusted(path, on_trust)} == set()
    # What is named as unchecked is so for a reason: some change of it does pass.
    assert ("result", "digest") in unnoticed


@pytest.mark.parametrize("kind", ["secagg", "assisted"])
def test_a_field_that_is_missing_or_unknown_is_a_finding(kind: str) -> None:
    made, roster = (secagg(), ROSTER) if kind == "secagg" else assisted()
    for name in made:
        assert failures(without(made, (name,)), roster), name
    unknown = failures({**made, "more": 1}, roster)
    assert [one.said for one in unknown] == ["the transcript has an unknown field 'more'"]
    tables = [path[:-1] for path, _ in leaves(made) if len(path) > 1 and isinstance(path[-1], str)]
    for where in set(tables):
        assert failures(with_leaf(made, (*where, "more"), 1), roster), where
    for path, _ in leaves(made):
        if isinstance(path[-1], str):
            assert failures(without(made, path), roster), path


@pytest.mark.parametrize("value", [None, 1, "x", [], {}, {"format": "fedveil-transcript"}, [{}], {"format": 1}])
def test_anything_else_is_a_finding(value: Any) -> None:
    # whatever a transcript holds, the outcome is a list of findings.
    # whatever value is read, the outcome is of the expected form, or a SecureAggregationError says where.
    assert [one.what for one in failures(value)] == ["form"]


def test_entries_left_out_or_in_another_order_are_found() -> None:
    made = secagg(6)
    for name in ("adverts", "survivors", "sharers", "confirmations"):
        assert failures({**made, name: made[name][::-1]}), name
        assert failures({**made, name: [*made[name], made[name][-1]]}), name
    for place in range(6):
        assert failures(without(made, ("adverts", place)))
        assert failures(without(made, ("survivors", place)))
        assert failures(without(made, ("sharers", place)))
    too_few = {**made, "confirmations": made["confirmations"][: made["quorum"] - 1], "unmasked": [0, 1]}
    said = [one.said for one in failures(too_few)]
    assert "this does not hold: at least the quorum of 4 confirmed before anybody unmasked" in said
    assert any(f"{made['threshold']} holders of every secret unmasked" in one for one in said)


def test_survivors_who_sent_no_shares_are_found() -> None:
    made = secagg(6, gone={"bulletin": {5}})
    assert made["sharers"] == [0, 1, 2, 3, 4]
    spoilt = {**made, "survivors": [0, 1, 2, 3, 4, 5]}
    assert any(one.what == "survivors" for one in failures(spoilt))


def test_a_transcript_of_another_roster_or_session_fails() -> None:
    # without a roster no signature is checked, and in semi-honest mode there is none; the findings say so.
    # a form that fits says nothing about who wrote it.
    made = secagg()
    other = {**ROSTER, 2: ROSTER[99]}
    assert "member 2 is not signed" in failures(made, other)[0].said
    revoked = {member: key for member, key in ROSTER.items() if member != 2}
    assert "member 2 is not on the pinned roster" in failures(made, revoked)[0].said
    assert failures(made, None) == []
    twin = secagg()
    for name in ("session", "bound", "survivors", "confirmations"):
        if made[name] != twin[name]:
            assert failures({**made, name: twin[name]}), name
    unsigned = json.loads(json.dumps(made))
    unsigned["confirmations"][0]["signature"] = twin["confirmations"][0]["signature"]
    assert [one.said for one in failures(unsigned)] == ["member 0 did not sign these survivors"]


def test_the_roster_that_was_pinned_is_compared() -> None:
    made = secagg()
    same = [one for one in check(made, ROSTER, roster_digest="ab") if one.what == "roster"]
    other = [one for one in check(made, ROSTER, roster_digest="cd") if one.what == "roster"]
    assert [one.verdict for one in (*same, *other)] == [Verdict.PASSED, Verdict.NOT_CHECKED]
    assert "another edition of the roster" in other[0].said


def test_a_void_attempt_that_could_have_been_opened_is_named() -> None:
    # a check that passes says that members signed what is recorded, and that it fits together; it does not say that
    # the server recorded every attempt, nor that the model was made from the sum.
    assert "enough shares came to open one" in notes(secagg(until="unmasked"))
    assert "too few shares came to open one" in notes(secagg(until="confirmed"))
    hidden = {**secagg(), "result": None}
    assert "enough shares came to open one, so whether it was opened is the server's word" in notes(hidden)


def test_a_simulation_without_masks_never_passes() -> None:
    parameters = Parameters.from_text(secagg(until="nothing")["parameters"])
    session = UnmaskedServerSession(parameters, range(3), ROSTER)
    made = json.loads(json.dumps(record(session)))
    assert [one.said for one in failures(made)] == [
        "the attempt was simulated without masks: it protected nobody, and proves nothing"
    ]


def test_a_transcript_holds_no_secret() -> None:
    # a transcript holds nothing but what the server and every member saw, and the digest of the sum.
    # a transcript holds nothing but what the server and every assistant saw, and the digest of the sum.
    made, total = secagg(), np.full(8, 0 + 1 + 2 + 3 + 4, "<u4")
    assert made["result"]["digest"] == hashlib.sha256(total.tobytes()).hexdigest()
    public = {"sealing_key", "mask_key", "nonce", "commitment", "signature"}
    assert {name for advert in made["adverts"] for name in advert} == {"member", *public}
    hexes = [value for path, value in leaves(made) if isinstance(value, str) and len(value) >= 32 and len(path) > 1]
    assert len(hexes) == 5 * 5 + 5 + 1  # adverts, confirmations, the digest: nothing else is that long
    for member in range(5):
        assert KEYS[member].private_bytes_raw().hex() not in json.dumps(made)
