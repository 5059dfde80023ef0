"""kill -9 in the middle of `reserve`: at every third line of it, and in the middle of what SQLite writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedml_core.privacy.ledger import Account, Ledger, Purpose
from tests.sources import ROOT

ONCE = {"name": "gaussian", "noise_multiplier": 1.0}
WARD = Account("ward-a", "example", "add-or-remove-one")
HEAD = """
import json, os, resource, shutil, signal, sys
from pathlib import Path
from fedml_core import private_files
from fedml_core.privacy import ledger as ledgers, ledger_entries, ledger_head
from fedml_core.privacy.ledger import Account, Ledger, Purpose

ONCE = {"name": "gaussian", "noise_multiplier": 1.0}
WARD = Account("ward-a", "example", "add-or-remove-one")
OURS = {module.__file__ for module in (ledgers, ledger_entries, ledger_head, private_files)}
folder = Path(sys.argv[1])


def begin(path, doom):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        ledger, purpose = Ledger(path), Purpose("run", "server", 1)
        doom()
        number = ledger.reserve(ONCE, WARD, purpose)
        sys.settrace(None)
        os.write(writing, b"begun")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read() == b"begun"
    status = os.waitpid(child, 0)[1]
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "told": told}


def tried(path, doom):
    before = len(Ledger(path).known())
    outcome = begin(path, doom)
    hot = path.with_name(path.name + "-journal").exists()
    after = len(Ledger(path).known())
    return {**outcome, "hot": hot, "grown": after - before}


def at_line(number):
    def doom():
        left = [number]

        def trace(frame, event, argument):
            if frame.f_code.co_filename not in OURS:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)

    return doom


def beyond(size):
    def doom():
        # Whoever writes beyond this place of any file is killed by the kernel, in the middle of writing.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return doom


rows = []
"""
LINES = """
base, number = folder / "base.sqlite", 0
while not rows or not rows[-1]["told"]:
    path = folder / f"{number}.sqlite"
    if sys.argv[2] == "old":  # a copy: each entry would make the next reserve longer
        if not base.exists():
            begin(base, lambda: None)
        for suffix in ("", ".head"):
            shutil.copy(f"{base}{suffix}", f"{path}{suffix}")
    rows.append(tried(path, at_line(number)))
    number += 3
print(json.dumps(rows))
"""
WRITES = """
path = folder / "0.sqlite"
for _ in range(12):
    begin(path, lambda: None)
size = 0
while size == 0 or size < path.stat().st_size + 8192:
    rows.append(tried(path, beyond(size)))
    size += 1021
print(json.dumps(rows))
"""


def rows_of(script: str, folder: Path, *more: str) -> list[dict[str, Any]]:
    outcome = subprocess.run(
        [sys.executable, "-c", HEAD + script, str(folder), *more], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert outcome.stderr == ""
    found: list[dict[str, Any]] = json.loads(outcome.stdout)
    return found


def require_nothing_lost(rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        # Whoever was told that it may begin is in the ledger; one that was killed before that may be, and only once.
        assert row["grown"] == 1 if row["told"] else row["grown"] in (0, 1), (place, row)
        assert row["told"] or row["signal"] != 0, (place, row)


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_kill_at_many_lines_of_reserve_loses_nothing_that_was_begun_and_harms_no_ledger(
    kind: str, tmp_path: Path
) -> None:
    rows = rows_of(LINES, tmp_path, kind)
    require_nothing_lost(rows)
    killed = [row for row in rows if row["signal"] == 9]
    assert len(killed) > 30 and rows[-1]["told"]
    # Before the commit there is nothing, after it the entry stays, whether or not anybody was told.
    grown = [row["grown"] for row in killed]
    assert 0 in grown and 1 in grown and grown == sorted(grown)
    for path in sorted(tmp_path.glob("*.sqlite")):
        ledger = Ledger(path)
        known = len(ledger.known())
        assert ledger.reserve(ONCE, WARD, Purpose("run", "server", 2)) == known + 1
        assert ledger.verify().number == known + 1


def test_a_kill_in_the_middle_of_what_sqlite_writes_is_undone_or_stays_whole(tmp_path: Path) -> None:
    rows = rows_of(WRITES, tmp_path)
    require_nothing_lost(rows)
    killed = [row for row in rows if row["signal"] != 0]
    assert len(killed) > 12 and any(row["told"] for row in rows)
    # Some died with the journal written and the ledger half overwritten: the next process puts it back.
    assert sum(row["hot"] for row in killed) > 3
    ledger = Ledger(tmp_path / "0.sqlite")
    assert ledger.verify().number == 12 + sum(row["grown"] for row in rows)
    assert not (tmp_path / "0.sqlite-journal").exists()
