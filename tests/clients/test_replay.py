"""The replay counter only ever goes up: not back over a kill, a second process, a full disk or a damaged file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from clients import replay
from clients.replay import ReplayCounter
from fedml_core.errors import RefusalError
from fedml_core.identity import PinnedRoster
from tests.sources import ROOT

KILLS = 30
CHILD = """
import sys
from pathlib import Path
from clients.replay import ReplayCounter

counter = ReplayCounter(Path(sys.argv[1]))
last = counter.last("run")
round = 0 if last is None else last[0] + 1
while True:
    counter.advance("run", round, round)
    print(round, flush=True)
    round += 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "replay.json"


def pinned(serial: int, digest: str = "d", operator: str = "ab" * 32) -> PinnedRoster:
    return PinnedRoster({1: b"k" * 32}, frozenset(), serial, operator, digest)


def refused(call: Callable[[], object], rule: str = "replay") -> str:
    with pytest.raises(RefusalError) as caught:
        call()
    assert caught.value.rule == rule
    return str(caught.value)


def test_what_is_let_through_is_strictly_increasing_for_each_run(path: Path) -> None:
    counter = ReplayCounter(path)
    assert counter.last("a") is None
    for place in ((0, 0), (0, 1), (1, 2), (7, 5), (6, 6)):
        counter.advance("a", *place)
        assert counter.last("a") == ReplayCounter(path).last("a") == place
    for place in ((6, 6), (8, 6), (9, 5), (0, 0)):
        assert refused(partial(counter.advance, "a", *place)) == (
            f"the server asks for attempt {place[1]}, at round {place[0]}, this site has taken part in attempt 6, "
            "at round 6; it must go on from there"
        )
    counter.advance("b", 0, 0)
    assert (counter.last("a"), counter.last("b")) == ((6, 6), (0, 0))


def test_a_site_that_starts_again_goes_on_from_the_file(path: Path) -> None:
    ReplayCounter(path).advance("a", 3, 1)
    refused(lambda: ReplayCounter(path).advance("a", 3, 1))
    ReplayCounter(path).advance("a", 3, 2)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("run", "round", "attempt", "said"),
    [
        ("", 0, 0, "a run must be named by 1 to 128 characters"),
        ("x" * 129, 0, 0, "a run must be named by 1 to 128 characters"),
        (5, 0, 0, "a run must be named by 1 to 128 characters"),
        ("a", -1, 0, "round must be a whole number from 0, got -1"),
        ("a", 0, True, "attempt must be a whole number from 0, got True"),
        ("a", 2**53 + 1, 0, "round must be a whole number from 0, got 9007199254740993"),
        ("a", 0, 1.5, "attempt must be a whole number from 0, got 1.5"),
    ],
)
def test_a_place_that_is_none_is_refused_and_leaves_no_file(
    path: Path, run: str, round: int, attempt: int, said: str
) -> None:
    assert refused(lambda: ReplayCounter(path).advance(run, round, attempt)) == said
    assert not path.exists()


@pytest.mark.parametrize("name", ['"', "\\", "\ud800", "ä\n"])
def test_a_run_may_have_any_name(path: Path, name: str) -> None:
    ReplayCounter(path).advance(name, 1, 1)
    assert ReplayCounter(path).last(name) == (1, 1)


def test_runs_are_not_forgotten_and_at_the_limit_no_new_one_is_begun(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_MAX_RUNS", 3)
    counter = ReplayCounter(path)
    for name in "abc":
        counter.advance(name, 0, 0)
    assert "has taken part in 3 runs and forgets none" in refused(lambda: counter.advance("d", 0, 0))
    counter.advance("a", 0, 1)
    refused(lambda: counter.advance("c", 0, 0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("9", "8"),
        lambda text: text.replace('"a"', '"b"'),
        lambda text: json.dumps({**json.loads(text), "runs": {}}),
        lambda text: json.dumps({**json.loads(text), "more": 1}),
        lambda text: json.dumps({**json.loads(text), "version": 2}),
        lambda text: "[" * 5000,
    ],
)
def test_a_damaged_file_is_a_refusal_and_never_a_fresh_start(path: Path, damage: Callable[[str], str]) -> None:
    counter = ReplayCounter(path)
    counter.advance("a", 9, 0)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    for call in (
        lambda: counter.advance("a", 99, 0),
        lambda: counter.advance("new", 0, 0),
        lambda: counter.last("a"),
        lambda: counter.admit_roster(pinned(1)),
    ):
        said = refused(call)
        assert said.startswith("this site's replay counter is damaged")
        assert str(path.parent) not in said
    assert path.read_text() == damaged


def test_a_file_that_cannot_be_read_is_a_refusal(path: Path) -> None:
    path.mkdir(parents=True)
    assert "is damaged" in refused(lambda: ReplayCounter(path).advance("a", 0, 0))
    path.rmdir()
    path.symlink_to(path.parent / "nowhere")
    assert "is damaged" in refused(lambda: ReplayCounter(path).advance("a", 0, 0))


def test_a_folder_that_cannot_be_made_is_a_refusal_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    counter = ReplayCounter(tmp_path / "file" / "memory" / "replay.json")
    assert refused(lambda: counter.advance("a", 0, 0)) == (
        "this site's replay counter cannot be opened; see to its memory folder"
    )


def test_the_file_is_flushed_renamed_and_its_folder_flushed_before_anything_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ReplayCounter(path).advance("a", 0, 0)
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        done.append("folder" if os.fstat(handle).st_ino == path.parent.stat().st_ino else "draft")
        fsync(handle)

    def renamed(draft: Path, target: Path) -> Path:
        done.append("rename")
        return rename(draft, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    ReplayCounter(path).advance("a", 0, 1)
    assert done == ["draft", "rename", "folder"]


@pytest.mark.parametrize(("broken", "after"), [("draft", (0, 0)), ("rename", (0, 0)), ("folder", (0, 1))])
def test_a_disk_that_fails_at_any_step_is_a_refusal_and_the_counter_does_not_go_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, after: tuple[int, int]
) -> None:
    ReplayCounter(path).advance("a", 0, 0)
    fsync, rename = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        what = "folder" if os.fstat(handle).st_ino == path.parent.stat().st_ino else "draft"
        if what == broken:
            raise OSError(28, "No space left on device")
        fsync(handle)

    def renamed(draft: Path, target: Path) -> Path:
        if broken == "rename":
            raise OSError(28, "No space left on device")
        return rename(draft, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", flushed)
        patched.setattr(Path, "replace", renamed)
        said = refused(lambda: ReplayCounter(path).advance("a", 0, 1))
    assert said == "this site's replay counter cannot be written; see to the disk of its memory"
    assert ReplayCounter(path).last("a") == after
    ReplayCounter(path).advance("a", 0, 2)
    assert sorted(one.name for one in path.parent.iterdir()) == [".replay.json.lock", "replay.json"]


def test_a_second_process_of_the_site_is_refused_while_the_first_is_at_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, said = ReplayCounter(path), list[str]()
    fsync = os.fsync

    def meanwhile(handle: int) -> None:
        said.append(refused(lambda: ReplayCounter(path).advance("a", 5, 1)))
        fsync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", meanwhile)
        counter.advance("a", 0, 0)
    assert set(said) == {"another process of this site is at its replay counter; run one client at a time"}
    assert counter.last("a") == (0, 0)
    ReplayCounter(path).advance("a", 5, 1)


def test_of_many_threads_that_ask_for_one_attempt_one_gets_it(path: Path) -> None:
    counter, won, start = ReplayCounter(path), list[int](), threading.Barrier(8)

    def ask(number: int) -> None:
        start.wait(30)
        with suppress(RefusalError):
            counter.advance("a", 4, 0)
            won.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1


def test_the_counter_never_goes_back_over_kills_at_any_moment(path: Path) -> None:
    reported = -1
    for kill in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            # The child goes on while its lines are read, so that the kill finds it anywhere between two of them.
            told = [int(child.stdout.readline()) for _ in range(1 + kill % 5)]
            child.kill()
            told += [int(line) for line in child.stdout]
        assert told[0] > reported
        reported = told[-1]
        counter = ReplayCounter(path)
        last = counter.last("run")
        assert last is not None
        # One more may be on the disk than could be reported; never one less.
        assert last[0] - reported in (0, 1)
        refused(partial(counter.advance, "run", reported, reported))
    ReplayCounter(path).advance("run", reported + 2, reported + 2)
    assert sorted(one.name for one in path.parent.iterdir()) == [".replay.json.lock", "replay.json"]


def test_an_older_roster_is_refused_also_after_a_restart(path: Path) -> None:
    counter = ReplayCounter(path)
    counter.advance("a", 3, 0)
    counter.admit_roster(pinned(4))
    counter.admit_roster(pinned(4))
    counter.admit_roster(pinned(6, "e"))
    counter = ReplayCounter(path)
    said = refused(lambda: counter.admit_roster(pinned(5)), "roster")
    assert said == "this site's roster has serial 5, and it has seen serial 6; it needs the operator's newest roster"
    said = refused(lambda: counter.admit_roster(pinned(6, "f")), "roster")
    assert said.startswith("this site has seen two rosters of serial 6 that admit different members")
    assert counter.last("a") == (3, 0)
    counter.admit_roster(replace(pinned(6, "e"), revoked=frozenset({2})))
    counter.admit_roster(pinned(1, operator="cd" * 32))
    counter.advance("a", 4, 1)
    refused(lambda: counter.admit_roster(pinned(5)), "roster")
