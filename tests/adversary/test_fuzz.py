"""The fuzzer's own ground: it sees what is no refusal, tells what it needs, and knows every kind."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from fedml_core.secagg import transcript
from fedml_core.secagg.codec import Kind
from tests.adversary import decoders, fuzz
from tests.adversary.decoders import Due, due


@pytest.mark.parametrize("name", fuzz.names())
def test_what_it_begins_with_is_read_and_what_it_may_find_is_refused_time_after_time(name: str) -> None:
    read, seeds = fuzz.target_of(name)
    for data in (*seeds, b"", b"fvsa", *seeds, seeds[0][:-1], seeds[0] + b"\0", *seeds):
        read(data)


@pytest.mark.parametrize("wrong", [KeyError("3"), RecursionError("too deep"), MemoryError()], ids=repr)
def test_whatever_is_no_refusal_comes_out(wrong: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise wrong

    monkeypatch.setattr(decoders, "due", lambda kind: Due(b"", broken))
    read, _ = fuzz.target_of("bulletin")
    with pytest.raises(type(wrong)):
        read(b"fvsa")


def test_a_session_is_still_in_its_phase_after_a_refusal() -> None:
    made: list[Due] = []

    def noted(kind: Kind) -> Due:
        made.append(due(kind))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoders, "due", noted)
        read, seeds = fuzz.target_of("delivery")
        made.clear()
        for _ in range(5):
            read(seeds[0][:-1])
        assert [one.session.phase.name for one in made] == ["SHARED"]
        made[0].read(made[0].message)
        assert made[0].session.phase.name == "RECEIVED"


def test_bytes_say_where_a_transcript_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    check = transcript.check

    def noting(value: object, roster: Mapping[int, bytes]) -> object:
        seen.append(value)
        return check(value, roster)

    monkeypatch.setattr(transcript, "check", noting)
    read, seeds = fuzz.target_of("transcript")
    read(b"\x00\x01\xff-1")
    whole = json.loads(seeds[0])
    assert seen == [{**whole, list(whole)[1]: -1}]


def test_one_input_is_read_without_a_fuzzer(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--kind", "bulletin", "--input", "667673610102"]) == 0
    with pytest.raises(SystemExit):
        fuzz.main(["--kind", "letter"])
    assert "--kind must be one of advert, bulletin" in capsys.readouterr().err


def test_without_atheris_the_way_to_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "find_spec", lambda name: None)
    assert fuzz.main(["--seconds", "1"]) == 2
    assert "fuzzing needs atheris, which is not installed; pip install atheris" in capsys.readouterr().out
