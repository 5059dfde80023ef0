"""The ledger holds what was begun: before it is done, whatever happens after, and nothing of it can be taken back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fedml_core.errors import CheckpointError, ConfigError, PrivacyError, RefusalError
from fedml_core.privacy.accounting import Claim, epsilon_of
from fedml_core.privacy.budget import Budget
from fedml_core.privacy.ledger import Account, Ledger, Purpose
from tests.sources import ROOT

WARD = Account("ward-a", "example", "add-or-remove-one")
ONCE = {"name": "gaussian", "noise_multiplier": 1.0}
KILLS = 40
CHILD = """
import sys
from pathlib import Path
from fedml_core.privacy.ledger import Account, Ledger, Purpose

ledger, number = Ledger(Path(sys.argv[1])), 0
while True:
    number = ledger.reserve(
        {"name": "gaussian", "noise_multiplier": 1.0},
        Account("ward-a", "example", "add-or-remove-one"),
        Purpose("run", "server", number),
    )
    print(number, flush=True)
"""
RACER = """
import sys
from pathlib import Path
from fedml_core.errors import RefusalError
from fedml_core.privacy.ledger import Account, Budget, Ledger, Purpose

account = Account("ward-a", "client", "add-or-remove-one")
budget = Budget(epsilon=10.0, delta=1e-5, unit="client", adjacency="add-or-remove-one")
event = {"name": "laplace", "scale": 1.0}
sys.stdin.readline()
for number in range(8):
    try:
        Ledger(Path(sys.argv[1]), cost=lambda events, **_: type("C", (), {"epsilon": float(len(events))})()).reserve(
            event, account, Purpose("run", "server", number), budget=budget
        )
        print("passed", flush=True)
    except RefusalError:
        print("refused", flush=True)
"""


def counting(events: Sequence[Mapping[str, Any]], *, delta: float, unit: str, adjacency: str) -> Claim:
    """One event is one epsilon: exact, whatever the accountant of the day says."""
    return Claim(float(len(events)), delta, unit, adjacency, "none", "counting")


def budget(epsilon: float | None = 3.0, **changes: Any) -> Budget:
    table: dict[str, Any] = {"epsilon": epsilon, "delta": 1e-5, "unit": "example", "adjacency": "add-or-remove-one"}
    return Budget(**{**table, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "ledger.sqlite"


def filled(path: Path, count: int = 4) -> Ledger:
    ledger = Ledger(path)
    for number in range(1, count + 1):
        assert ledger.reserve(ONCE, WARD, Purpose("run", "server:1", number)) == number
    return ledger


def tampered(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TRIGGER IF EXISTS no_change")
        connection.execute("DROP TRIGGER IF EXISTS no_removal")
        connection.execute(statement, values)


def refused(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(RefusalError) as caught:
        call()
    return caught.value.rule, str(caught.value)


def test_an_entry_is_read_back_exactly_as_it_was_written_by_whoever_opens_the_file_next(path: Path) -> None:
    # "An entry is read back exactly as it was written, or not at all."
    event = {"name": "poisson", "sampling_probability": 0.1, "event": ONCE}
    purpose = Purpose("run", "fl.example.org:8443", 7, "example", "ab" * 32, 2)
    Ledger(path).reserve(event, WARD, purpose)
    (entry,) = Ledger(path).entries()
    assert (entry.number, entry.event, entry.dataset, entry.unit) == (1, event, "ward-a", "example")
    assert (entry.run, entry.server, entry.round, entry.participation) == ("run", "fl.example.org:8443", 7, 2)
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(found.name for found in path.parent.iterdir()) == ["ledger.sqlite", "ledger.sqlite.head"]


def test_what_is_spent_is_the_cost_of_all_events_over_runs_and_servers(path: Path) -> None:
    ledger = Ledger(path)
    for run, server in (("a", "one"), ("b", "two"), ("b", "two")):
        ledger.reserve(ONCE, WARD, Purpose(run, server, 1))
    ledger.reserve(ONCE, Account("ward-b", "example", "add-or-remove-one"), Purpose("a", "one", 1))
    expected = epsilon_of([ONCE] * 3, delta=1e-5, unit="example", adjacency="add-or-remove-one")
    assert ledger.spent(WARD, 1e-5) == expected
    assert ledger.spent(WARD, 1e-5, run="a").epsilon == pytest.approx(4.377178, rel=1e-5)
    assert ledger.spent(Account("nobody", "example", "replace-one"), 1e-5).epsilon == 0


def test_a_resumed_run_pays_on_ten_rounds_of_one_epoch_cost_what_one_run_of_ten_costs(path: Path) -> None:
    epoch = {"name": "poisson", "sampling_probability": 0.05, "event": {"name": "gaussian", "noise_multiplier": 1.2}}
    for number in range(10):
        Ledger(path).reserve({"name": "repeated", "count": 20, "event": epoch}, WARD, Purpose("run", "s", number))
    whole = [{"name": "repeated", "count": 200, "event": epoch}]
    expected = epsilon_of(whole, delta=1e-5, unit="example", adjacency="add-or-remove-one")
    assert Ledger(path).spent(WARD, 1e-5).epsilon == pytest.approx(expected.epsilon, rel=1e-9)


def test_the_adjacency_is_the_askers_and_doubles_the_bound_under_replace_one(path: Path) -> None:
    ledger = filled(path, 1)
    assert ledger.spent(Account("ward-a", "example", "replace-one"), 1e-5).epsilon >= 9.99


def test_a_release_without_noise_makes_what_is_spent_unbounded(path: Path) -> None:
    # "An earlier release without noise leaves nothing to spend."
    ledger = filled(path, 1)
    ledger.reserve(None, Account("ward-a", "client", "add-or-remove-one"), Purpose("run", "s", 2))
    claim = ledger.spent(WARD, 1e-5)
    assert (claim.epsilon, claim.accountant) == (math.inf, "none")
    assert refused(lambda: ledger.reserve(ONCE, WARD, Purpose("run", "s", 3), budget=budget(100.0))) == (
        "epsilon",
        "1 earlier releases of these data carried no noise, so no epsilon is left to spend",
    )


def test_a_budget_refuses_the_event_that_would_exceed_it_and_writes_nothing(path: Path) -> None:
    # "an event is refused if it would bring what is spent above any of the budget's limits."
    ledger = Ledger(path, cost=counting)
    for number in range(3):
        ledger.reserve(ONCE, WARD, Purpose("run", "s", number), budget=budget())
    rule, said = refused(lambda: ledger.reserve(ONCE, WARD, Purpose("run", "s", 3), budget=budget()))
    assert (rule, said) == (
        "epsilon",
        "3.0000 of the epsilon 3 is spent (delta 1e-05, unit example, add-or-remove-one), and this round would "
        "make it 4.0000; ask for more noise or fewer rounds",
    )
    assert len(ledger.entries()) == 3
    ledger.reserve(ONCE, Account("ward-b", "example", "add-or-remove-one"), Purpose("run", "s", 3), budget=budget())


def test_limits_of_a_run_and_of_a_round_hold_beside_the_total(path: Path) -> None:
    ledger, limits = Ledger(path, cost=counting), budget(4.0, epsilon_per_run=2.0, epsilon_per_round=1.0)
    for run in "ab":
        for number in range(2):
            ledger.reserve(ONCE, WARD, Purpose(run, "s", number), budget=limits)
    assert refused(lambda: ledger.reserve(ONCE, WARD, Purpose("c", "s", 1), budget=limits))[0] == "epsilon"
    wider = budget(9.0, epsilon_per_run=2.0)
    assert refused(lambda: ledger.reserve(ONCE, WARD, Purpose("a", "s", 1), budget=wider))[0] == "epsilon_per_run"
    tight = budget(None, epsilon_per_round=0.5)
    assert refused(lambda: ledger.check(ONCE, WARD, Purpose("d", "s", 1), tight))[0] == "epsilon_per_round"
    assert len(ledger.entries()) == 4


def test_a_budget_refuses_what_it_cannot_count(path: Path) -> None:
    # "A release without noise, or one of another unit, is refused under a budget: nothing could account for it."
    ledger = Ledger(path)
    assert refused(lambda: ledger.reserve(None, WARD, Purpose("r", "s", 1), budget=budget()))[0] == "unprotected"
    client = Account("ward-a", "client", "add-or-remove-one")
    assert refused(lambda: ledger.reserve(ONCE, client, Purpose("r", "s", 1), budget=budget()))[0] == "unit"
    with pytest.raises(PrivacyError, match="nothing can account for an event named 'hope'"):
        ledger.reserve({"name": "hope"}, WARD, Purpose("r", "s", 1))
    assert ledger.entries() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epsilon": None}, "a budget must set one of epsilon, epsilon_per_run, epsilon_per_round"),
        ({"epsilon": 0.0}, "epsilon must be > 0, got 0.0"),
        ({"delta": 1.0}, "delta must be > 0 and < 1, got 1.0"),
        ({"unit": "patient"}, "unit must be one of client, example, got 'patient'"),
        ({"adjacency": "none"}, "adjacency must be one of add-or-remove-one, replace-one, replace-special, got 'none'"),
    ],
)
def test_a_budget_that_is_none_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        budget(**changes)
    assert str(caught.value) == said


def test_the_same_data_cannot_begin_anew_under_another_name(path: Path) -> None:
    ledger = Ledger(path)
    content = ledger.digest([b"shape", b"values"])
    assert content != ledger.digest([b"shapev", b"alues"])
    assert content != Ledger(path.with_name("other.sqlite")).digest([b"shape", b"values"])
    ledger.reserve(ONCE, WARD, Purpose("r", "s", 1, "", content))
    renamed = Account("ward-a-new", "example", "add-or-remove-one")
    assert refused(lambda: ledger.reserve(ONCE, renamed, Purpose("r", "s", 2, "", content))) == (
        "dataset",
        "these data are in the ledger as 'ward-a', so they cannot begin anew as 'ward-a-new'; keep the name",
    )
    ledger.reserve(ONCE, WARD, Purpose("r", "s", 2, "", ledger.digest([b"a row more"])))


@pytest.mark.parametrize(
    ("account", "purpose", "said"),
    [
        (Account("", "example", "replace-one"), Purpose("r", "s", 1), "dataset must be named by 1 to 200 characters"),
        (Account("d", "patient", "replace-one"), Purpose("r", "s", 1), "unit must be one of client, example"),
        (Account("d", "example", "close"), Purpose("r", "s", 1), "adjacency must be one of add-or-remove-one"),
        (WARD, Purpose("", "s", 1), "run must be named by 1 to 200 characters"),
        (WARD, Purpose("r", "s", -1), "round must be >= 0"),
    ],
)
def test_an_entry_that_says_nothing_is_refused(path: Path, account: Account, purpose: Purpose, said: str) -> None:
    with pytest.raises((PrivacyError, ConfigError), match=said):
        Ledger(path).reserve(ONCE, account, purpose)
    assert not path.exists()


@pytest.mark.parametrize(
    ("statement", "values", "said"),
    [
        ("UPDATE entry SET text = replace(text, '1.0', '9.0') WHERE number = 2", (), "entry 2 was changed"),
        ("UPDATE entry SET text = CAST(text AS BLOB) WHERE number = 2", (), "entry 2 was changed"),
        ("DELETE FROM entry WHERE number = 3", (), "entry 3 is missing, the next one is entry 4"),
        ("DELETE FROM entry WHERE number = 1", (), "entry 1 is missing, the next one is entry 2"),
        ("DELETE FROM entry WHERE number = 4", (), "entry 4 is missing, the head says that there are 4"),
        ("DELETE FROM entry", (), "entry 1 is missing, the head says that there are 4"),
        ("UPDATE ledger SET identity = ?", ("0" * 32,), "entry 1 was exchanged"),
        ("UPDATE ledger SET format = 2", (), "it has format 2, this version reads 1"),
        ("DELETE FROM ledger", (), "it has format None, this version reads 1"),
    ],
)
def test_an_entry_that_was_changed_exchanged_or_taken_out_is_named_and_nothing_more_is_spent(
    path: Path, statement: str, values: tuple[object, ...], said: str
) -> None:
    # "an entry that was changed, exchanged, taken out or put in between breaks the chain at its own number."
    ledger = filled(path)
    assert ledger.verify().number == 4
    tampered(path, statement, *values)
    for call in (ledger.verify, ledger.entries, lambda: ledger.reserve(ONCE, WARD, Purpose("run", "s", 9))):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert said in str(caught.value)


def test_two_entries_that_changed_places_and_one_put_in_between_break_the_chain(path: Path) -> None:
    ledger = filled(path)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT number, text, hash FROM entry ORDER BY number").fetchall()
    for number, other in ((2, 3), (3, 2)):
        tampered(path, "UPDATE entry SET text = ?, hash = ? WHERE number = ?", *rows[other - 1][1:], number)
    with pytest.raises(CheckpointError, match="entry 2 was exchanged"):
        ledger.verify()


def test_a_chain_that_was_made_anew_contradicts_the_head(path: Path, tmp_path: Path) -> None:
    # "A ledger with fewer entries than its head, or with others, is refused; so is one whose head is gone."
    filled(path)
    other = tmp_path / "other" / "ledger.sqlite"
    shutil.copytree(path.parent, other.parent)
    shorter = filled(tmp_path / "empty" / "ledger.sqlite", 4)
    shutil.copy(shorter.path, path)
    with pytest.raises(CheckpointError, match="is the head of another ledger"):
        Ledger(path).verify()
    other.with_name("ledger.sqlite.head").unlink()
    with pytest.raises(CheckpointError, match="says how far the ledger went, is missing or damaged"):
        Ledger(other).reserve(ONCE, WARD, Purpose("run", "s", 9))
    other.with_name("ledger.sqlite.head").write_text('{"entries": -1}')
    with pytest.raises(CheckpointError, match="missing or damaged"):
        Ledger(other).verify()


def test_a_ledger_that_was_removed_is_not_begun_anew_while_its_head_is_there(path: Path) -> None:
    # "A ledger that was changed, cut short against its head, or cannot be read is an error, never a fresh start."
    ledger = filled(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="its head is there: it was removed"):
        ledger.known()
    with pytest.raises(CheckpointError, match="does not exist, and its head is there: it was removed; restore it"):
        ledger.reserve(ONCE, WARD, Purpose("run", "s", 9))
    for content in (b"", b"no database" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged|cannot be used"):
            ledger.reserve(ONCE, WARD, Purpose("run", "s", 9))


def test_an_old_copy_of_both_files_is_seen_by_a_hash_that_was_noted_or_a_head_kept_elsewhere(
    path: Path, tmp_path: Path
) -> None:
    # "whoever can write both files, or puts both back from one older copy, is not seen; keep the head on another disk,
    # or note it from time to time."
    ledger = filled(path, 2)
    old = tmp_path / "old"
    shutil.copytree(path.parent, old)
    ledger.reserve(ONCE, WARD, Purpose("run", "s", 3))
    noted = ledger.verify().digest
    assert ledger.verify(noted).number == 3
    for name in ("ledger.sqlite", "ledger.sqlite.head"):
        shutil.copy(old / name, path.with_name(name))
    assert ledger.verify().number == 2
    with pytest.raises(CheckpointError, match=f"the hash {noted[:16]} that was noted is in none of its 2 entries"):
        ledger.verify(noted)
    apart = Ledger(tmp_path / "b.sqlite", head=tmp_path / "disk" / "head")
    apart.reserve(ONCE, WARD, Purpose("run", "s", 1))
    shutil.copy(tmp_path / "b.sqlite", tmp_path / "b.old")
    apart.reserve(ONCE, WARD, Purpose("run", "s", 2))
    shutil.copy(tmp_path / "b.old", tmp_path / "b.sqlite")
    with pytest.raises(CheckpointError, match="entry 2 is missing, the head says that there are 2"):
        apart.reserve(ONCE, WARD, Purpose("run", "s", 3))


def test_whoever_can_write_every_file_can_make_a_new_chain_and_only_a_noted_head_shows_it(path: Path) -> None:
    # "whoever can write every file of a ledger, its head included, can make a new chain that holds; only a head that
    # was noted elsewhere shows that."
    noted = filled(path).verify().digest
    shutil.rmtree(path.parent)
    assert filled(path, 1).verify().number == 1
    with pytest.raises(CheckpointError, match="that was noted is in none of its 1 entries"):
        Ledger(path).verify(noted)


def test_by_accident_nobody_changes_or_removes_an_entry(path: Path) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as connection:
        for statement in ("UPDATE entry SET text = ''", "DELETE FROM entry"):
            with pytest.raises(sqlite3.IntegrityError, match="a ledger only grows"):
                connection.execute(statement)


def test_a_ledger_that_is_only_looked_at_is_not_made(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.known() == []
    for call in (ledger.entries, ledger.verify, ledger.lines):
        with pytest.raises(CheckpointError, match="does not exist; name another ledger, or take part in a run first"):
            call()
    ledger.check(ONCE, WARD, Purpose("run", "s", 1), budget(5.0))
    assert ledger.spent(WARD, 1e-5).epsilon == 0
    assert not path.parent.exists()


def test_a_file_that_was_made_and_killed_before_its_first_entry_is_no_obstacle(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    ledger = Ledger(path)
    assert ledger.known() == []
    with pytest.raises(CheckpointError, match="holds no ledger"):
        ledger.verify()
    assert ledger.reserve(ONCE, WARD, Purpose("run", "s", 1)) == 1


def test_many_that_begin_a_ledger_at_once_begin_one(tmp_path: Path) -> None:
    for attempt in range(12):
        path, numbers, ready = tmp_path / str(attempt) / "ledger.sqlite", list[int](), threading.Barrier(6)

        def begin(path: Path = path, numbers: list[int] = numbers, ready: threading.Barrier = ready) -> None:
            ready.wait()
            ledger = Ledger(path)
            known = len(ledger.known())
            ledger.digest([b"data"])
            number = ledger.reserve(ONCE, WARD, Purpose("run", "s", 1))
            assert number > known
            numbers.append(number)

        threads = [threading.Thread(target=begin) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
        assert Ledger(path).verify().number == 6


def test_the_export_holds_every_entry_and_every_hash_and_no_key(path: Path) -> None:
    ledger = filled(path, 2)
    first, *lines = [json.loads(line) for line in ledger.lines()]
    assert (first["format"], first["entries"]) == ("fedveil-ledger/1", 2)
    assert [line["event"] for line in lines] == [ONCE, ONCE]
    assert lines[1]["previous"] == lines[0]["hash"]
    assert lines[1]["hash"] == ledger.verify().digest
    with closing(sqlite3.connect(path)) as connection:
        (salt,) = connection.execute("SELECT salt FROM ledger").fetchone()
    assert salt.hex() not in "".join(ledger.lines())


def test_a_commit_waits_for_the_disk(path: Path) -> None:
    # EXTRA is 3: a commit also waits until the journal's end is on the disk, or a power cut could undo it.
    ledger = filled(path, 1)
    with ledger._open(make=False) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (3,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_an_entry_stays_when_the_head_cannot_be_written_and_the_release_does_not_begin(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "Nothing takes an entry back: a release that fails after `reserve` stays spent."
    # "the head is written after the entry that it names is on the disk, so a kill never makes a true ledger look cut
    # short."
    ledger = filled(path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedml_core.privacy.ledger_head.private_files.replace", full)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left on device"):
        ledger.reserve(ONCE, WARD, Purpose("run", "s", 2))
    monkeypatch.undo()
    assert len(ledger.entries()) == 2
    assert ledger.reserve(ONCE, WARD, Purpose("run", "s", 3)) == 3


def test_a_kill_at_any_moment_leaves_every_entry_that_was_begun(path: Path) -> None:
    # "`reserve` returns only once its entry is on the disk; a kill or a power cut at any moment leaves every entry for
    # which it returned."
    begun, draws = 0, Random(5)
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            for _ in range(draws.randrange(5)):
                begun = int(child.stdout.readline())
            for _ in range(draws.randrange(100_000)):  # not always at the same place of the next one
                pass
            child.kill()
            rest = child.stdout.read().split()
        begun = int(rest[-1]) if rest else begun
        entries = Ledger(path).entries() if path.exists() and begun else []
        # One more may be there: written, and killed before it could say so.
        assert begun <= len(entries) <= begun + 1
        begun = len(entries)
    assert begun > KILLS
    assert Ledger(path).verify().number == begun
    assert Ledger(path).reserve(ONCE, WARD, Purpose("run", "s", 0)) == begun + 1


def test_of_threads_and_processes_at_once_never_two_get_the_last_bit(path: Path) -> None:
    # "Of processes that reserve at once, never two get the last bit of a budget."
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said: list[str] = []
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        said += racer.communicate(timeout=120)[0].split()
        assert racer.returncode == 0
    assert said.count("passed") == 10
    assert said.count("refused") == 14
    assert Ledger(path).verify().number == 10

    account, limits = Account("ward-b", "example", "add-or-remove-one"), budget(5.0)
    outcomes: list[bool] = []

    def race() -> None:
        for number in range(3):
            try:
                Ledger(path, cost=counting).reserve(ONCE, account, Purpose("run", "s", number), budget=limits)
                outcomes.append(True)
            except RefusalError:
                outcomes.append(False)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes.count(True), outcomes.count(False)) == (5, 7)


def test_entries_hold_no_data(path: Path) -> None:
    # "the data holder's own machine; entries hold no data, only names, numbers, times and a keyed digest."
    ledger = Ledger(path)
    ledger.reserve(ONCE, WARD, Purpose("run", "s", 1, content=ledger.digest([b"patient 4711"])))
    assert b"patient 4711" not in path.read_bytes()
    digests = {hashlib.blake2b(b"patient 4711", digest_size=32).hexdigest()}
    assert digests.isdisjoint(entry.content for entry in ledger.entries())


def test_a_budget_is_what_the_site_wrote_whatever_an_event_says(path: Path) -> None:
    # "the site's own files; nothing that a server sends changes a budget."
    limits = budget(1.0)
    for event in ({**ONCE, "epsilon": 0.0}, {**ONCE, "noise_multiplier": float("inf")}, {**ONCE, "delta": 0.5}):
        with pytest.raises(PrivacyError):
            Ledger(path).reserve(event, WARD, Purpose("run", "s", 1), budget=limits)
    assert refused(lambda: Ledger(path).reserve(ONCE, WARD, Purpose("run", "s", 1), budget=limits))[0] == "epsilon"


def test_every_answer_is_about_a_chain_that_holds(path: Path) -> None:
    # "every answer is about a chain that holds, up to the head at least."
    ledger = filled(path, 3)
    tampered(path, "UPDATE entry SET hash = ? WHERE number = 1", "0" * 64)
    calls: list[Callable[[], object]] = [
        ledger.entries,
        ledger.verify,
        ledger.lines,
        lambda: ledger.spent(WARD, 1e-5),
        lambda: ledger.check(ONCE, WARD, Purpose("run", "s", 1), budget()),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="entry 1 was changed: its hash is not that of its text"):
            call()
