"""What every benchmark measures and prints: seconds of rounds, start-up, peak memory, and the machine's own facts."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Peak", "Rounds", "machine", "print_line", "print_properties", "since_start"]

_PROC = Path("/proc")
_LOOK_S = 0.2


def since_start() -> float:
    """Return the seconds since this process was started, imports included; NaN where the system does not say."""
    try:
        ticks = int((_PROC / "self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return float((_PROC / "uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return float("nan")


@dataclass(frozen=True)
class Rounds:
    """Measured rounds. `seconds`: of each; `samples`: trained in each. `startup_s`: to the end of the first round."""

    seconds: Sequence[float]
    samples: Sequence[float]
    startup_s: float

    def line(self, workload: str, engine: str, round_examples: int, rss_mb: float) -> dict[str, Any]:
        """Return the line of results; `sec_per_round` is that of a cohort of `round_examples`.

        The rate is that of all rounds together, not the best or the middle one: a round that is slow is paid for.
        """
        rate = sum(self.samples) / sum(self.seconds)
        each = [samples / seconds for samples, seconds in zip(self.samples, self.seconds, strict=True)]
        return {
            "workload": workload,
            "engine": engine,
            "samples_per_s": round(rate, 1),
            "middle_samples_per_s": round(statistics.median(each), 1),
            "sec_per_round": round(round_examples / rate, 6),
            "startup_s": round(self.startup_s, 2),
            "rss_mb": round(rss_mb),
            "rounds": len(self.seconds),
            **machine(),
        }


class Peak:
    """Watches the memory of this process and its descendants, shared pages counted once where the system says so.

    Looking costs time, so a benchmark looks during rounds that it does not measure.
    """

    def __init__(self, root: int | None = None) -> None:
        self._root, self._largest = root or os.getpid(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self.look()

    def look(self) -> None:
        """Take note of what is used now."""
        self._largest = max(self._largest, sum(_held_mb(process) for process in _tree(self._root)))

    def pause(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def megabytes(self) -> float:
        """Return the largest sum seen, or what the system remembers of this process if that is more."""
        self.look()
        scale = 2**20 if sys.platform == "darwin" else 2**10
        alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale if self._root == os.getpid() else 0.0
        return max(self._largest, alone)


def machine() -> dict[str, Any]:
    """Return what a reader must know about the machine to compare a result."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processors": processors,
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
    }


def print_line(row: dict[str, Any]) -> None:
    """Print one JSON line."""
    print(json.dumps(row), flush=True)


def print_properties(asked: Mapping[str, Any], runs: Mapping[str, Callable[[], object]]) -> None:
    """Run each check and print one JSON line: what was asked, what each came to, and its seconds of processor time."""
    found: dict[str, Any] = {}
    for name, run in runs.items():
        started = time.process_time()
        found[name] = run()
        found[f"{name}_cpu_s"] = round(time.process_time() - started, 1)
    print_line({**asked, **found, **machine()})


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop()
        found.append(process)
        for listed in (_PROC / str(process) / "task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting.extend(int(child) for child in listed.read_text().split())
    return found


def _held_mb(process: int) -> float:
    with contextlib.suppress(OSError):
        for row in (_PROC / str(process) / "smaps_rollup").read_text().splitlines():
            if row.startswith("Pss:"):
                return int(row.split()[1]) / 1024
    return 0.0


def _processor() -> str:
    with contextlib.suppress(OSError):
        for row in (_PROC / "cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
