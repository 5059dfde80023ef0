"""What a site must never forget: the last attempt of each run that it took part in, and the newest roster that it saw.

Two secure sums over one attempt, or an old roster with a revoked member, would let a server learn a difference. Runs
are kept for ever: a run that was forgotten could be played again. At 4096 runs no new one is begun; the file is then
some 300 KiB.

Guarantees: for each run, what `advance` lets through is strictly increasing, also over a kill or a power cut at any
    moment, and over several processes of one site; what it let through is on the disk before it returns.
Guarantees: a file that is damaged, or cannot be read, is a refusal, never a fresh start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedml_core import private_files
from fedml_core.errors import ConfigError, RefusalError
from fedml_core.pinned_roster import PinnedRoster

if sys.platform != "win32":
    import fcntl

__all__ = ["REPLAY_FILE", "ReplayCounter"]

REPLAY_FILE = "replay.json"
_FORMAT, _VERSION = "fedveil-replay", 1
_MAX_RUNS = 4096
_MAX_RUN_LENGTH = 128
_MAX_NUMBER = 2**53
_DRAFTS = "[0-9a-f]" * 16


@dataclass(frozen=True)
class _Seen:
    """The last (round, attempt) by run, and the newest (serial, digest) by operator."""

    runs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rosters: Mapping[str, tuple[int, str]] = field(default_factory=dict)


class ReplayCounter:
    """The durable counter of one site, in the file `path`; the folder is made if there is none.

    It holds no file open between calls, and reads what another process may have written. Where there are no file locks
    (Windows), two processes of one site must not run at once.

    Raises: RefusalError: from every method, if the file is damaged, cannot be written, or another process is at it.
        Messages may reach the server and hold no path; the cause does.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._in_process = threading.Lock()

    def last(self, run: str) -> tuple[int, int] | None:
        """Return the last (round, attempt) of a run, or None before its first."""
        with self._locked():
            return self._read().runs.get(run)

    def advance(self, run: str, round_number: int, attempt: int) -> None:
        """Let an attempt through: return once it is on the disk that this site took part in it.

        Attempts are numbered over all rounds of a run: a server that was restarted may come back to an earlier round
        in a later attempt, and only in that.
        Raises: RefusalError: with rule "replay", unless the attempt is greater than the last one of this run.
        """
        _require_place(run, round_number, attempt)
        with self._locked():
            seen = self._read()
            last = seen.runs.get(run)
            if last is not None and attempt <= last[1]:
                raise _refusal(
                    f"the server asks for attempt {attempt}, at round {round_number}, this site has taken part in "
                    f"attempt {last[1]}, at round {last[0]}; it must go on from there"
                )
            if last is None and len(seen.runs) >= _MAX_RUNS:
                raise _refusal(
                    f"this site has taken part in {_MAX_RUNS} runs and forgets none; it needs a new memory folder, "
                    "once those runs are over"
                )
            self._write(_Seen({**seen.runs, run: (round_number, attempt)}, seen.rosters))

    def admit_roster(self, roster: PinnedRoster) -> None:
        """Return once it is on the disk that this site has seen `roster`.

        Raises: RefusalError: with rule "roster", if it has seen a newer one of this operator, or another of its serial.
        """
        with self._locked():
            seen = self._read()
            serial, digest = seen.rosters.get(roster.operator, (0, ""))
            if roster.serial < serial:
                raise RefusalError(
                    "roster",
                    f"this site's roster has serial {roster.serial}, and it has seen serial {serial}; it needs the "
                    "operator's newest roster",
                )
            if roster.serial == serial and roster.digest != digest:
                raise RefusalError(
                    "roster",
                    f"this site has seen two rosters of serial {serial} that admit different members; ask the operator "
                    "for one of a higher serial",
                )
            if roster.serial > serial:
                self._write(_Seen(seen.runs, {**seen.rosters, roster.operator: (roster.serial, roster.digest)}))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._in_process:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                handle = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise _refusal("this site's replay counter cannot be opened; see to its memory folder") from error
            try:
                _lock(handle)
                yield
            finally:
                os.close(handle)

    def _read(self) -> _Seen:
        if not os.path.lexists(self._path):
            return _Seen()
        try:
            return _seen(private_files.read_json(self._path, "the replay counter"))
        except (ConfigError, ValueError, TypeError, KeyError) as error:
            raise _refusal(
                "this site's replay counter is damaged, and without it an attempt could be played again; remove it "
                "only once every run that it counted is over"
            ) from error

    def _write(self, seen: _Seen) -> None:
        content = _content(seen)
        try:
            # Nobody else writes while the lock is held: these drafts are of processes that were killed.
            for draft in self._path.parent.glob(f".{self._path.name}.{_DRAFTS}"):
                draft.unlink()
            private_files.replace(self._path, private_files.to_json(content), private_files.SECRET)
            private_files.sync_folder(self._path.parent)
        except (ConfigError, OSError) as error:
            raise _refusal("this site's replay counter cannot be written; see to the disk of its memory") from error


def _require_place(run: str, round_number: int, attempt: int) -> None:
    if not isinstance(run, str) or not 1 <= len(run) <= _MAX_RUN_LENGTH:
        raise _refusal(f"a run must be named by 1 to {_MAX_RUN_LENGTH} characters")
    for name, number in (("round", round_number), ("attempt", attempt)):
        if type(number) is not int or not 0 <= number <= _MAX_NUMBER:
            raise _refusal(f"{name} must be a whole number from 0, got {str(number)[:40]}")


def _lock(handle: int) -> None:
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refusal("another process of this site is at its replay counter; run one client at a time") from error


def _content(seen: _Seen) -> dict[str, Any]:
    content = {"format": _FORMAT, "version": _VERSION, "runs": seen.runs, "rosters": seen.rosters}
    return {**content, "sha256": _checksum(content)}


def _seen(content: dict[str, Any]) -> _Seen:
    """Return what a file's content says; ValueError, TypeError or KeyError if it is not exactly what was written."""
    checksum = content.pop("sha256")
    if (content["format"], content["version"]) != (_FORMAT, _VERSION) or checksum != _checksum(content):
        raise ValueError("its checksum, format or version is wrong")
    runs = {str(run): (int(round), int(attempt)) for run, (round, attempt) in content["runs"].items()}
    rosters = {str(by): (int(serial), str(digest)) for by, (serial, digest) in content["rosters"].items()}
    return _Seen(runs, rosters)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _refusal(message: str) -> RefusalError:
    return RefusalError("replay", message)
