"""`fedveil verify-transcript`: a verdict, an exit code, and never a traceback, whatever the file holds."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml_core.identity import PinnedRoster, read_roster, read_site_keys
from tests.fedml_core.secagg.transcript_cases import secagg
from tests.simulations.project_cases import fedveil, last_json
from tests.sources import ROOT


def written(path: Path, *attempts: Any) -> Path:
    path.write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    return path


@pytest.fixture
def roster(tmp_path: Path) -> Path:
    """Return a signed roster of three sites, whose keys lie beside it."""
    found = tmp_path / "roster.json"
    assert fedveil("keys", "operator", tmp_path / "operator").exit_code == 0
    for member in range(3):
        site = tmp_path / f"site-{member}"
        assert fedveil("keys", "new", site).exit_code == 0
        options = ("--name", f"s{member}", "--id", f"{member}", "--roster", found, "--operator", tmp_path / "operator")
        made = fedveil("keys", "enrol", site / "site-public.json", *options)
        assert made.exit_code == 0, made.output
    return found


def keys_of(roster: Path) -> Mapping[int, Ed25519PrivateKey]:
    return {member: read_site_keys(roster.parent / f"site-{member}").identity for member in range(3)}


def digest_of(roster: Path) -> str:
    return PinnedRoster.of(read_roster(roster)).digest


def test_a_runs_transcript_is_verified_with_its_roster(tmp_path: Path, roster: Path) -> None:
    pinned: dict[str, Any] = {"keys": keys_of(roster), "roster": digest_of(roster)}
    lines = [secagg(3, round=number, attempt=number, **pinned) for number in (1, 2)]
    file = written(tmp_path / "secagg.jsonl", *lines, secagg(3, round=3, attempt=3, until="adverts", **pinned))
    shown = fedveil("verify-transcript", file, "--roster", roster)
    assert shown.exit_code == 0, shown.output
    assert "round 1, attempt 1: a sum, " in shown.stdout
    assert "round 3, attempt 3: no sum, " in shown.stdout
    assert "verdict  all " in shown.stdout
    facts = last_json(fedveil("verify-transcript", file, "--roster", roster, "--json"))
    assert facts["verdict"] == "passed"
    assert facts["signatures_checked"] is True
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [one["summed"] for one in facts["attempts"]] == [True, True, False]
    assert "every party had pinned the roster" in json.dumps(facts)
    every = fedveil("verify-transcript", file, "--roster", roster, "--all")
    assert every.stdout.count("the session id follows from parameters and adverts") == 2


def test_what_does_not_hold_is_said_and_the_exit_code_is_1(tmp_path: Path, roster: Path) -> None:
    good = secagg(3, keys=keys_of(roster), roster=digest_of(roster))
    file = written(tmp_path / "secagg.jsonl", {**good, "survivors": [0, 1]})
    shown = fedveil("verify-transcript", file, "--roster", roster)
    assert shown.exit_code == 1
    assert "member 0 did not sign these survivors" in shown.stdout
    assert "checks failed" in shown.stdout
    facts = last_json(fedveil("verify-transcript", file, "--roster", roster, "--json"))
    assert facts["verdict"] == "failed"
    assert facts["failed"] >= 3
    strangers = secagg(3)  # signed by others than those on the roster
    assert fedveil("verify-transcript", written(file, strangers), "--roster", roster).exit_code == 1


def test_without_a_roster_the_verdict_says_that_no_signature_counted(tmp_path: Path) -> None:
    file = written(tmp_path / "secagg.jsonl", secagg(3))
    shown = fedveil("verify-transcript", file)
    assert shown.exit_code == 0
    assert "no signature was checked, because no --roster was given" in shown.stdout
    assert "not checked  signatures" in shown.stdout  # a single attempt is shown whole
    assert last_json(fedveil("verify-transcript", file, "--json"))["signatures_checked"] is False


def test_an_attempt_twice_and_two_sums_of_a_round_are_found(tmp_path: Path) -> None:
    first, second = secagg(3, attempt=1), secagg(3, attempt=2)
    again = fedveil("verify-transcript", written(tmp_path / "secagg.jsonl", first, first))
    assert again.exit_code == 1
    assert "the same attempt is recorded before" in again.stdout
    both = fedveil("verify-transcript", written(tmp_path / "secagg.jsonl", first, second))
    assert both.exit_code == 1
    assert "the round has a sum before this one" in both.stdout
    void = secagg(3, attempt=1, until="shares")
    assert fedveil("verify-transcript", written(tmp_path / "secagg.jsonl", void, second)).exit_code == 0


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", 2, "is empty"),
        (b"\n", 1, "line 1 is no JSON"),
        (b'{"format": ', 1, "was it cut short?"),
        (b"\xff\xfe\n", 1, "line 1 is no JSON"),
        (b"[" * 100_000, 1, "line 1 is no JSON"),
        (b"1" * 10_000 + b"\n", 1, "line 1 is no JSON"),
        (b"null\n{}\n", 1, "is it the right file?"),
        (b'{"format": NaN}\n', 1, "line 1 is no JSON"),
        (b'{"format": 1, "format": 2}\n', 1, "line 1 is no JSON"),
    ],
)
def test_a_file_that_is_no_transcript_ends_in_one_line(tmp_path: Path, content: bytes, code: int, said: str) -> None:
    file = tmp_path / "secagg.jsonl"
    file.write_bytes(content)
    shown = fedveil("verify-transcript", file)
    assert shown.exit_code == code
    assert said in shown.output
    assert "Traceback" not in shown.output
    assert "bug in fedveil" not in shown.output


def test_a_file_that_cannot_be_read_is_a_mistake_to_mend(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        shown = fedveil("verify-transcript", path)
        assert shown.exit_code == 2
        assert "cannot be read" in shown.output
    file = written(tmp_path / "secagg.jsonl", secagg(3, until="nothing"))
    assert fedveil("verify-transcript", file, "--roster", tmp_path / "none.json").exit_code == 2


def test_bytes_changed_at_random_never_pass_for_the_whole_and_never_crash(tmp_path: Path, roster: Path) -> None:
    file = written(tmp_path / "secagg.jsonl", secagg(3, keys=keys_of(roster), roster=digest_of(roster)))
    content, draws = file.read_bytes(), random.Random(5)
    body = content[: content.index(b'"result"')]  # the digest behind it is the server's word
    passed = 0
    for _ in range(60):
        at = draws.randrange(len(body))
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << draws.randrange(7))]) + content[at + 1 :])
        shown = fedveil("verify-transcript", file, "--roster", roster)
        assert shown.exit_code in (0, 1)
        assert "bug in fedveil" not in shown.output
        passed += shown.exit_code == 0
    assert passed <= 1  # white space between two fields, at the very most


def test_verifying_loads_neither_torch_nor_flower(tmp_path: Path) -> None:
    file = written(tmp_path / "secagg.jsonl", secagg(3))
    code = (
        "import sys; from simulations.app import app\n"
        f"try: app(['verify-transcript', {str(file)!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted({'torch', 'flwr', 'pydantic', 'sklearn'} & set(sys.modules)))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert outcome.stdout.splitlines()[-1] == "[]"
