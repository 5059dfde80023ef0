"""Sums with assistants: exact whoever is lost, and stopped when anybody departs from the protocol."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedml_core.errors import SecureAggregationError, ThresholdError
from fedml_core.secagg import assistant as assistant_module
from fedml_core.secagg.adverts import verify
from fedml_core.secagg.assisted import Contribution, Panel, root_key
from fedml_core.secagg.assisted_client import AssistedClient
from fedml_core.secagg.codec import Kind, Reader, Writer
from fedml_core.secagg.keys import KeyPair
from fedml_core.secagg.masks import add_masks
from fedml_core.secagg.phases import AssistedPhase
from fedml_core.secagg.secrets import Secret
from tests.fedml_core.secagg.assisted_cases import BINDING, Assisted

STOPPED = (SecureAggregationError, ThresholdError)


def survivors(*members: int) -> bytes:
    return Writer(Kind.CONTRIBUTORS).numbers(members).bytes()


def flipped(message: bytes, at: int) -> bytes:
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


def gathered(**options: Any) -> Assisted:
    """Return a sum whose contributions are with the assistants."""
    case = Assisted(**options)
    case.advertise()
    case.contribute()
    case.gather()
    return case


def secrets_of(session: object) -> list[Secret]:
    """Return every secret that a session holds."""
    found: list[Secret] = []
    for value in vars(session).values():
        listed = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        found += [one for one in listed if isinstance(one, Secret)]
        found += [one._secret for one in listed if isinstance(one, KeyPair)]
    return found


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(("assistants", "threshold"), [(2, 1), (3, 1), (4, 3), (5, 2), (7, 3)])
def test_the_sum_is_exact(assistants: int, threshold: int, bits: int) -> None:
    # the result is the sum of exactly the contributors' vectors modulo 2^bits if the assistants summed the right
    # masks, or an error.
    case = Assisted(3, assistants, threshold, bits=bits, length=37)
    np.testing.assert_array_equal(case.run(), case.expected())
    assert all(session.phase is AssistedPhase.OVER or session._answered for session in case.assistants.values())


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize(("assistants", "threshold"), [(3, 1), (4, 1), (4, 2), (5, 2)])
def test_every_combination_of_lost_assistants_at_every_moment(assistants: int, threshold: int, active: bool) -> None:
    spare = Assisted(3, assistants, threshold, active=active).assistance.spare(active=active)
    assert spare >= 1
    numbers = range(100, 100 + assistants)
    for count in range(1, spare + 1):
        for lost in itertools.combinations(numbers, count):
            for moment in range(4):
                case = Assisted(3, assistants, threshold, active=active, length=5)
                case.advertise(absent=lost if moment == 0 else ())
                case.contribute([0, 1])
                case.gather()
                for one in lost if moment == 1 else ():
                    case.server.lose(one)
                case.contribute([2])
                case.gather()
                case.witness()
                for one in lost if moment == 2 else ():
                    case.server.lose(one)
                requests = case.server.requests()
                if moment == 3:
                    for one in lost:
                        case.server.lose(one)
                    case.answer({one: listed for one, listed in requests.items() if one not in lost})
                    requests = case.server.requests()
                case.answer(requests)
                np.testing.assert_array_equal(case.server.total(), case.expected())


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize(("assistants", "threshold"), [(3, 1), (5, 2), (4, 3)])
def test_one_assistant_fewer_stops_the_sum_and_reveals_nothing(assistants: int, threshold: int, active: bool) -> None:
    fresh = Assisted(3, assistants, threshold, active=active)
    lost = range(100, 100 + fresh.assistance.spare(active=active) + 1)
    with pytest.raises(ThresholdError, match="assistants advertised, the quorum is"):
        fresh.advertise(absent=lost)
    case = gathered(members=3, assistants=assistants, threshold=threshold, active=active)
    for one in lost:
        case.server.lose(one)
    with pytest.raises(ThresholdError, match="assistants are left, the quorum is"):
        case.server.close_contributions()
    late = gathered(members=3, assistants=assistants, threshold=threshold, active=active)
    late.witness()
    requests = late.server.requests()
    gone = late.assistance.subsets[0]  # all but these hold its roots: the sum stays masked with what they hold
    for one in late.assistance.holders(0):
        late.server.lose(one)
    late.answer({one: listed for one, listed in requests.items() if one in gone})
    with pytest.raises(ThresholdError, match="no assistant is left that holds the roots"):
        late.server.requests()
    with pytest.raises(ThresholdError, match="still on the sum"):
        late.server.total()


def test_lost_contributors_cost_nothing_and_the_minimum_holds() -> None:
    case = Assisted(5)
    case.advertise()
    case.contribute([0, 3])
    case.gather()
    case.witness()
    case.answer()
    np.testing.assert_array_equal(case.server.total(), case.expected([0, 3]))
    assert case.server.contributors == (0, 3)
    alone = Assisted(5)
    alone.advertise()
    alone.contribute([2])
    alone.gather()
    with pytest.raises(ThresholdError, match="1 contributions were accepted, 0 were not; the minimum is 2"):
        alone.server.close_contributions()


def test_an_assistants_own_floor_holds_whatever_the_server_says() -> None:
    # it answers only for contributors whose roots it opened, of whom there are as many as its own floor and the
    # parameters ask for, and only when a quorum of assistants signed the very set that it signed.
    # the client does not see who else contributes: assistants it trusts hold the line at the minimum.
    case = gathered()
    with pytest.raises(ThresholdError, match="1 members contributed, the minimum is 2"):
        case.assistants[100].witness(survivors(0))
    case = Assisted()
    case.assistants[101] = case.assistant(101, minimum=4)
    case.advertise()
    case.contribute([0, 1, 2])
    case.gather()
    with pytest.raises(ThresholdError, match="3 members contributed, the minimum is 4"):
        case.assistants[101].witness(survivors(0, 1, 2))
    for named, said in (((0, 7), "no roots of contributor 7"), ((1, 0), "ascending"), ((1, 1), "ascending")):
        session = gathered().assistants[102]
        with pytest.raises(SecureAggregationError, match=said):
            session.witness(survivors(*named))
        assert session.phase is AssistedPhase.OVER


def test_two_sets_are_never_both_answered() -> None:
    # a session signs at most one set of contributors, and answers for no other.
    case = gathered()
    first, other = survivors(0, 1, 2, 3), survivors(0, 1, 2)
    case.server.close_contributions()
    for one, message in ((100, first), (101, other), (102, other)):
        with_signature = case.assistants[one].witness(message)
        if message is first:
            case.server.receive_witness(one, with_signature)
        else:
            with pytest.raises(SecureAggregationError, match=f"assistant {one} did not sign the contributors"):
                case.server.receive_witness(one, with_signature)
        if one == 101:
            signature = with_signature
    mixed = Writer(Kind.WITNESSES).number(2).number(100).fixed(case.server.witnesses[100], 64)
    mixed.number(101).fixed(signature[6:], 64).numbers([1])
    with pytest.raises(ThresholdError, match="1 assistants signed the contributors that this one signed, the quorum"):
        case.assistants[100].answer(mixed.bytes())
    with pytest.raises(SecureAggregationError, match="witness was asked of a session that is over"):
        case.assistants[100].witness(other)
    with pytest.raises(SecureAggregationError, match="witness was asked of a session that is witnessed"):
        case.assistants[102].witness(first)


@pytest.mark.parametrize("change", ["twice", "stranger", "unsigned", "other subset", "no subset", "again", "order"])
def test_a_request_that_the_protocol_does_not_allow_ends_the_assistant(change: str) -> None:
    case = gathered(assistants=4)
    case.witness()
    signed, wanted = dict(case.server.witnesses), [1]
    if change == "unsigned":
        signed = dict.fromkeys(signed, bytes(64))
    if change == "stranger":
        signed[99] = signed.pop(103)
    listed = sorted(signed.items())
    if change == "twice":
        listed[1] = listed[0]
    wanted = {"other subset": [0], "no subset": [], "order": [2, 1]}.get(change, wanted)
    request = Writer(Kind.WITNESSES).number(len(listed))
    for one, signature in listed:
        request.number(one).fixed(signature, 64)
    message = request.numbers(wanted).bytes()
    session = case.assistants[100]
    if change == "again":
        session.answer(message)
    with pytest.raises(STOPPED):
        session.answer(message)
    assert session.phase is AssistedPhase.OVER
    assert secrets_of(session) == [] or all(one.wiped for one in secrets_of(session))


def test_substituted_keys_are_found_by_everybody() -> None:
    # in active mode, every assistant's keys and every client's roots were signed by the identity key that the
    # pinned roster names.
    case = Assisted()
    case.advertise()
    panel = case.server.panel
    substituted = replace(panel.adverts[0], sealing_key=KeyPair.fresh().public)
    message = Panel(case.parameters, (substituted, *panel.adverts[1:]), case.roster).to_bytes
    for reader in (case.client(0).read_panel, case.assistant(101).read_panel):
        with pytest.raises(SecureAggregationError, match="keys of assistant 100 are not signed"):
            reader(message)
    stranger = replace(panel.adverts[0], assistant=7)
    with pytest.raises(SecureAggregationError, match="number 7 is no assistant"):
        case.client(0).read_panel(Panel(case.parameters, (stranger, *panel.adverts[1:]), case.roster).to_bytes)
    twice = Panel(case.parameters, (panel.adverts[0], *panel.adverts), case.roster).to_bytes
    with pytest.raises(SecureAggregationError, match="ascending"):
        case.client(0).read_panel(twice)
    client = case.client(0)
    other = Panel.read(case.parameters, panel.to_bytes, dict(case.roster))
    vector = case.vectors[0].copy()
    with pytest.raises(SecureAggregationError, match="was not checked against this member's"):
        client.contribute(other, BINDING, vector)
    np.testing.assert_array_equal(vector, case.vectors[0])


def test_two_assistants_with_one_key_are_refused_without_signatures_too() -> None:
    case = Assisted(active=False)
    case.advertise()
    first, second, third = case.server.panel.adverts
    same = replace(second, sealing_key=first.sealing_key)
    with pytest.raises(SecureAggregationError, match="the same key or nonce"):
        Panel.checked(case.parameters, (first, same, third), case.roster)


def test_an_assistant_joins_only_with_its_own_advert() -> None:
    case = Assisted()
    case.advertise()
    panel = case.server.panel
    late = case.assistant(100)
    late.advertise()  # other keys than those on the panel
    with pytest.raises(SecureAggregationError, match="does not hold the advert of assistant 100"):
        late.join(late.read_panel(panel.to_bytes), BINDING)
    left_out = case.assistant(102)
    left_out.advertise()
    small = Panel.checked(case.parameters, panel.adverts[:2], case.roster).to_bytes
    with pytest.raises(SecureAggregationError, match="does not hold the advert of assistant 102"):
        left_out.join(left_out.read_panel(small), BINDING)
    foreign = case.assistant(101)
    foreign.advertise()
    with pytest.raises(SecureAggregationError, match="was not checked against this assistant's"):
        foreign.join(Panel.read(case.parameters, panel.to_bytes, dict(case.roster)), BINDING)


def test_an_advert_that_would_stop_everybody_is_refused_as_it_comes() -> None:
    # no assistant's advert can stop the others: what each party would refuse is refused as it arrives.
    # it sees public keys only.
    for key in (bytes(32), (1).to_bytes(32, "little")):
        case = Assisted(active=False)
        case.server.receive_advert(101, case.assistants[101].advertise())
        low = replace(case.server.desk.adverts[0], assistant=100, sealing_key=key)
        with pytest.raises(SecureAggregationError, match="public key of member 100 is refused"):
            case.server.receive_advert(100, low.to_bytes())
        copied = replace(low, sealing_key=case.server.desk.adverts[0].sealing_key)
        with pytest.raises(SecureAggregationError, match="assistant 100 advertises a key or nonce of another"):
            case.server.receive_advert(100, copied.to_bytes())


def test_a_step_during_another_one_ends_both() -> None:
    case = Assisted()
    session = case.assistants[100]
    session.stepping.acquire()  # as a step in another thread does
    with pytest.raises(SecureAggregationError, match="advertise was asked of a session during another step"):
        session.advertise()
    session.stepping.release()
    with pytest.raises(SecureAggregationError, match="of a session that is over"):
        session.advertise()


def test_an_assistant_that_is_none_cannot_advertise() -> None:
    case = Assisted()
    with pytest.raises(SecureAggregationError, match="number 2 is no assistant of this sum"):
        case.assistant(2).advertise()


@pytest.mark.parametrize("active", [True, False])
def test_a_contribution_of_another_session_model_or_member_is_of_no_use(active: bool) -> None:
    # all who hold equal panels have the same session id; whoever holds another has another session id.
    old, new = Assisted(active=active), Assisted(active=active)
    new.identities, new.roster = old.identities, old.roster
    for case in (old, new):
        case.advertise()
    assert old.server.panel.session != new.server.panel.session
    message, vector = old.masked(0)
    with pytest.raises(SecureAggregationError, match="another model, other work or another session"):
        new.server.receive_contribution(0, message, vector)
    moved = message[:6] + new.server.panel.bound(BINDING) + message[38:]  # what a server could pretend
    if active:
        # all signatures of the new server are over the identities of the old one: the same people
        new.server._roster = old.roster
        with pytest.raises(SecureAggregationError, match="member 0 is not signed"):
            new.server.receive_contribution(0, moved, vector)
    else:
        new.server.receive_contribution(0, moved, vector)
        new.contribute([1, 2])
        new.gather()
        assert new.server.refusals == {100: (0,), 101: (0,), 102: (0,)}
        new.witness()
        new.answer()
        np.testing.assert_array_equal(new.server.total(), new.expected([1, 2]))


def test_the_server_takes_each_members_own_contribution_once() -> None:
    case = Assisted()
    case.advertise()
    message, vector = case.masked(0)
    with pytest.raises(SecureAggregationError, match="member 9 was not asked"):
        case.server.receive_contribution(9, message, vector)
    with pytest.raises(SecureAggregationError, match="member 1 contributes as member 0"):
        case.server.receive_contribution(1, message, vector)
    for wrong in (vector[:-1], vector.astype("<u8"), vector.reshape(1, -1)):
        with pytest.raises(SecureAggregationError, match="the masked vector must be uint32 of shape"):
            case.server.receive_contribution(0, message, wrong)
    case.server.receive_contribution(0, message, vector)
    with pytest.raises(SecureAggregationError, match="member 0 contributed before"):
        case.server.receive_contribution(0, message, vector)
    case.contribute([1])
    case.gather()
    case.witness()
    with pytest.raises(SecureAggregationError, match="came after the contributors were named"):
        case.server.receive_contribution(2, *case.masked(2))


@pytest.mark.parametrize("field", ["public_key", "commitment", "box", "signature"])
def test_a_contribution_that_was_changed_is_refused_by_the_assistant(field: str) -> None:
    # all assistants that accept a contribution hold the same roots: those that its client committed to.
    case = Assisted(active=field != "commitment")
    case.advertise()
    case.contribute()
    message = case.server.roundup(101)
    # tag, version, kind, count, and then of the first entry: member, key 32, three commitments, box, signature
    key = 6 + 4 + 4
    at = {"public_key": key, "commitment": key + 32, "box": key + 32 + 96 + 5, "signature": key + 32 + 96 + 80}[field]
    refused = Reader(case.assistants[101].gather(flipped(message, at)), Kind.REFUSALS).numbers()
    assert refused == [0]


def test_a_client_that_gives_assistants_different_roots_is_refused_by_one() -> None:
    case = Assisted(active=False)
    case.advertise()
    panel = case.server.panel
    first, second = case.masked(0)[0], case.masked(0)[0]
    size = Contribution.size(panel.assistance, panel.assistants) - 64
    boxes = 38 + size - 3 * 80
    mixed = first[: boxes + 80] + second[boxes + 80 : boxes + 160] + first[boxes + 160 :]
    case.server.receive_contribution(0, mixed, case.vectors[0])
    case.contribute([1, 2])
    case.gather()
    assert case.server.refusals == {101: (0,)}
    case.witness()
    case.answer()
    np.testing.assert_array_equal(case.server.total(), case.expected([1, 2]))


def test_a_contribution_is_gathered_once() -> None:
    case = Assisted()
    case.advertise()
    case.contribute()
    session, message = case.assistants[100], case.server.roundup(100)
    session.gather(message)
    with pytest.raises(SecureAggregationError, match="a contribution of member 0 came before"):
        session.gather(message)
    assert session.phase is AssistedPhase.OVER


def test_what_assistants_say_about_gathering_is_checked() -> None:
    case = Assisted()
    case.advertise()
    case.contribute([0, 1])
    reply = case.assistants[100].gather(case.server.roundup(100))
    with pytest.raises(SecureAggregationError, match="did not reply to the last roundup yet"):
        case.server.roundup(100)
    invented = Writer(Kind.REFUSALS).numbers([2]).bytes()
    with pytest.raises(SecureAggregationError, match="replies to contributions that it was not sent"):
        case.server.receive_gathered(100, invented)
    case.server.receive_gathered(100, reply)
    with pytest.raises(SecureAggregationError, match="replies to contributions that it was not sent"):
        case.server.receive_gathered(100, reply)
    with pytest.raises(SecureAggregationError, match="assistant 7 is not there"):
        case.server.roundup(7)


def test_the_server_holds_a_vector_only_until_the_assistants_opened_its_roots() -> None:
    # it expands no mask; it holds one vector, and those whose roots the assistants have not opened yet.
    case = Assisted(8)
    case.advertise()
    for member in range(8):
        case.contribute([member])
        assert len(case.server._waiting) == 1
        case.gather()
        assert len(case.server._waiting) == 0
    case.witness()
    case.answer()
    np.testing.assert_array_equal(case.server.total(), case.expected())


def test_two_assistants_that_disagree_void_the_sum() -> None:
    # it is believed to sum up the right masks; a wrong sum shows only if two assistants are asked and compared.
    case = gathered(assistants=3, each=2)
    case.witness()
    requests = case.server.requests()
    assert {len(listed) for listed in requests.values()} == {2}
    with pytest.raises(SecureAggregationError, match="summed up other masks than another one; the sum is void"):
        for one, listed in requests.items():
            for request in listed:
                message, vector = case.assistants[one].answer(request)
                case.server.receive_answer(one, message, vector + np.uint32(one == 102))
    with pytest.raises(ThresholdError, match="still on the sum"):
        case.server.total()
    honest = Assisted(4, 5, 2, each=2)
    np.testing.assert_array_equal(honest.run(), honest.expected())
    assert honest.server.compared == set(range(10))
    wrong = gathered(assistants=3)
    wrong.witness()
    for one, listed in wrong.server.requests().items():
        message, vector = wrong.assistants[one].answer(listed[0])
        wrong.server.receive_answer(one, message, vector + np.uint32(one == 102))
    np.testing.assert_array_equal(wrong.server.total() + np.uint32(1), wrong.expected())  # nobody notices


def test_an_answer_that_was_not_asked_for_is_refused() -> None:
    case = gathered()
    case.witness()
    requests = case.server.requests()
    message, vector = case.assistants[100].answer(requests[100][0])
    with pytest.raises(SecureAggregationError, match="assistant 101 was not asked for these masks"):
        case.server.receive_answer(101, message, vector)
    with pytest.raises(SecureAggregationError, match="the sum of masks must be uint32 of shape"):
        case.server.receive_answer(100, message, vector[:-1])
    case.server.receive_answer(100, message, vector)
    with pytest.raises(SecureAggregationError, match="assistant 100 was not asked for these masks"):
        case.server.receive_answer(100, message, vector)


def test_a_masked_vector_is_uniform_to_any_threshold_of_assistants_and_the_server() -> None:
    # the masked vector is uniform to the server and any `threshold` assistants, until the others sum its masks.
    # whoever runs it sees masked vectors, the sum of their masks, and who contributed.
    case = Assisted(2, 3, 1, length=1 << 16)
    for member in case.vectors:
        case.vectors[member] = np.zeros(1 << 16, "<u4")
    case.advertise()
    message, masked = case.masked(0)
    case.server.receive_contribution(0, message, masked)
    case.contribute([1])
    case.gather()
    curious = case.assistants[100]
    known = np.zeros(1 << 16, "<u4")
    for place in curious._joined.assistance.held_by(100):
        # what the assistant can take off this one vector with all that it has
        at = curious._joined.assistance.held_by(100).index(place)
        root = bytes(curious._roots[0].view()[32 * at : 32 * at + 32])
        key = root_key(root, curious._bound, 0, curious._joined.assistance.subsets[place])
        add_masks(known, [(key, 1)])
    for seen in (masked, masked - known):
        counts = np.bincount(seen.view(np.uint8), minlength=256)
        # chi-square with 255 degrees of freedom: 400 is exceeded with a probability below 1e-8
        assert float(((counts - 1024) ** 2 / 1024).sum()) < 400
    other, again = case.masked(0)[1], case.masked(0)[1]
    assert np.count_nonzero(other == again) < 20


def test_what_assistants_give_away_is_one_sum_for_each_subset() -> None:
    # it gives away sums of masks over all contributors, one for each subset at most, and never a root or a key.
    case = gathered()
    roots = {bytes(secret.view()[at : at + 32]) for secret in case.assistants[100]._roots.values() for at in (0, 32)}
    case.witness()
    message, vector = case.assistants[100].answer(case.server.requests()[100][0])
    assert len(roots) == 8
    sent = message + vector.tobytes()
    assert not any(root in sent for root in roots)
    assert len(message) == 6 + 4 + 4 * 1
    case.assistants[100].answer(case.server._request((1,)))
    assert case.assistants[100].phase is AssistedPhase.OVER


def test_secrets_are_wiped_at_the_end_and_after_any_error() -> None:
    # a session that met an error, or that contributed, is wiped, and answers nothing more.
    # a step that is asked for out of order, or during another one, and any error within a step, wipes the session,
    # which answers nothing more.
    case = gathered(assistants=2)
    kept = {one: secrets_of(session) for one, session in case.assistants.items()}
    assert all(len(secrets) == 5 for secrets in kept.values())
    case.witness()
    case.answer()
    assert all(one.wiped for secrets in kept.values() for one in secrets)
    for spoil in ("gather", "witness", "answer", "join"):
        spoilt = gathered(assistants=2).assistants[100]
        secrets = secrets_of(spoilt)
        step: Callable[..., Any] = getattr(spoilt, spoil)
        with pytest.raises(STOPPED):
            step(b"nonsense") if spoil != "join" else step(None, BINDING)
        assert all(one.wiped for one in secrets)
        with pytest.raises(SecureAggregationError, match="of a session that is over"):
            spoilt.gather(b"")


def test_a_client_keeps_nothing_after_its_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    # roots and keys are made from the operating system's randomness for this one sum.
    case = Assisted()
    case.advertise()
    client, made = case.client(0), list[Secret]()
    fresh = Secret.fresh

    def remembered(size: int = 32) -> Secret:
        made.append(fresh(size))
        return made[-1]

    monkeypatch.setattr(Secret, "fresh", remembered)
    panel = client.read_panel(case.server.panel.to_bytes)
    client.contribute(panel, BINDING, case.vectors[0].copy())
    assert len(made) == 7  # a key to try each assistant's, three roots and its own key
    assert all(one.wiped for one in made)
    with pytest.raises(SecureAggregationError, match="contribute was asked of a session that is over"):
        client.contribute(panel, BINDING, case.vectors[0].copy())


@pytest.mark.parametrize("wrong", [np.zeros(3, "<u4"), np.zeros(50, "<u2"), np.zeros((50, 1), "<u4")])
def test_a_client_refuses_a_vector_of_another_shape_or_type(wrong: np.ndarray[Any, Any]) -> None:
    case = Assisted()
    case.advertise()
    client = case.client(0)
    panel = client.read_panel(case.server.panel.to_bytes)
    with pytest.raises(SecureAggregationError, match="the vector must be uint32"):
        client.contribute(panel, BINDING, wrong)
    assert not wrong.any()
    assert client.phase is AssistedPhase.OVER


def test_sessions_do_not_print_pickle_or_copy() -> None:
    case = gathered()
    for session in (case.assistants[100], case.client(0)):
        assert repr(session) in (
            "AssistantSession(assistant=100, phase=GATHERING)",
            "AssistedClient(member=0, phase=FRESH)",
        )
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(SecureAggregationError, match="neither copied nor stored"):
                attempt(session)
    assert isinstance(case.client(0), AssistedClient)


def test_messages_cut_lengthened_or_of_another_kind_are_errors() -> None:
    case = Assisted()
    case.advertise()
    contribution, vector = case.masked(0)
    panel, advert = case.server.panel.to_bytes, case.server.panel.adverts[0].to_bytes()
    case.contribute([1])
    roundup = case.server.roundup(100)
    readers: list[tuple[bytes, Callable[[bytes], object]]] = [
        (panel, case.client(0).read_panel),
        (advert, lambda data: Assisted().server.receive_advert(100, data)),
        (contribution, lambda data: case.server.receive_contribution(0, data, vector)),
        (roundup, lambda data: gathered_only(case, data)),
    ]
    for message, read in readers:
        for bad in (message[:-1], message + b"\0", b"", flipped(message, 0), flipped(message, 4), flipped(message, 5)):
            with pytest.raises(SecureAggregationError):
                read(bad)


def gathered_only(case: Assisted, message: bytes) -> bytes:
    """Let an assistant that just joined gather a message."""
    session = case.assistant(100)
    session.advertise()
    session._panel, session._bound, session.phase = case.server.panel, b"", AssistedPhase.GATHERING
    return session.gather(message)


def test_adverts_are_taken_once_from_their_own_assistants() -> None:
    case = Assisted()
    advert = case.assistants[100].advertise()
    with pytest.raises(SecureAggregationError, match="assistant 101 advertises as assistant 100"):
        case.server.receive_advert(101, advert)
    with pytest.raises(SecureAggregationError, match="the assistants' adverts are still being collected"):
        case.server.panel  # noqa: B018 - reading it is what raises
    case.server.receive_advert(100, advert)
    with pytest.raises(SecureAggregationError, match="assistant 100 advertised twice"):
        case.server.receive_advert(100, advert)
    case.server.receive_advert(101, case.assistants[101].advertise())
    case.server.close_adverts(BINDING)
    with pytest.raises(SecureAggregationError, match="came after the panel"):
        case.server.receive_advert(102, case.assistants[102].advertise())
    with pytest.raises(SecureAggregationError, match="1 or 2 assistants are asked"):
        Assisted(each=3)


def test_an_assistant_expands_masks_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    # memory beyond the roots is one vector and a batch of ciphers, however many contributors there are.
    monkeypatch.setattr(assistant_module, "_BATCH", 3)
    sizes = []
    real = add_masks

    def counted(total: Any, masks: list[Any], *, threads: int) -> None:
        sizes.append(len(masks))
        real(total, masks, threads=threads)

    monkeypatch.setattr(assistant_module, "add_masks", counted)
    case = Assisted(7)
    np.testing.assert_array_equal(case.run(), case.expected())
    assert max(sizes) == 3
    assert sum(sizes) == 7 * 3  # every contributor's mask for every subset, once


def test_an_assistant_learns_no_update() -> None:
    # an assistant sees who contributes, and no update: without the masked vectors a mask says nothing.
    # whoever holds one of the two secret keys of a box can open it; nothing else here is secret.
    # as far as a session can forget: see `secrets`.
    # a session knows itself only; whoever makes sessions keeps, durably, that a round was signed in, and never signs
    # in it again.
    first, second = Assisted(active=False, bits=16), Assisted(active=False, bits=16)
    second.vectors = {member: vector + np.uint16(1) for member, vector in first.vectors.items()}
    for case in (first, second):
        case.advertise()
        case.contribute()
    assert len(first.server.roundup(100)) == len(second.server.roundup(100)) == 10 + 4 * (4 + 32 + 96 + 80 + 64)
    # A second session of the same assistant for the same round signs another set: it knows nothing of the first.
    again = gathered()
    before = again.assistants[100].witness(survivors(0, 1, 2, 3))
    twin = again.assistant(100)
    twin.advertise()
    twin.join(Panel.checked(again.parameters, [one_of(twin), *again.server.panel.adverts[1:]], again.roster), BINDING)
    twin.gather(roundup_for(again, twin))
    assert twin.witness(survivors(0, 1)) != before
    assert verify(again.roster[100], before[6:], again_digest(again))


def one_of(session: Any) -> Any:
    return session._advert


def roundup_for(case: Assisted, session: Any) -> bytes:
    """Return the contributions of members 0 and 1 to a session's own panel."""
    writer = Writer(Kind.ROUNDUP).number(2)
    for member in (0, 1):
        client = case.client(member)
        message = client.contribute(client.read_panel(session._panel.to_bytes), BINDING, case.vectors[member].copy())
        reader = Reader(message, Kind.CONTRIBUTION)
        reader.fixed(32)
        Contribution.read(reader, case.assistance, case.server.panel.assistants).to(100).write(writer)
    return writer.bytes()


def again_digest(case: Assisted) -> bytes:
    case.server.close_contributions()
    return case.server.contributors_digest()
