"""What the progress display costs: processor time a round, and a second for the bar that redraws itself.

    python -m benchmarks.progress_cost

A run of rounds of `round_s` seconds pays `per_round / round_s + per_second` of its time.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from rich.console import Console as Screen

from fedml_core.console import Console
from server.progress import Progress
from server.round import RoundReport

ROUNDS = 5000
SECONDS = 5.0
ROUND_S = (0.001, 0.01, 0.1, 1.0)


def report(number: int) -> RoundReport:
    """Return a round's report as a run on digits gives it."""
    return RoundReport(
        round=number,
        status="ok",
        why="",
        cohort=20,
        replies=20,
        participants=tuple(range(20)),
        missing=(),
        excluded=(),
        metrics={
            "server": {"examples": 360.0, "loss": 0.5, "accuracy": 0.9},
            "train": {"examples": 300.0, "loss": 1.0},
        },
        bytes_up=390_000,
        bytes_down=390_000,
        seconds=0.01,
        protection="none",
    )


@contextlib.contextmanager
def stderr_to_nothing() -> Iterator[None]:
    """Throw away what is written to stderr inside."""
    kept, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = kept


def per_round(screen: Screen | None) -> float:
    """Return the processor seconds that one call takes, the redrawing thread's left out as far as it can be."""
    with Progress(Console(), ROUNDS, screen=screen) as progress:
        started = time.thread_time()
        for number in range(1, ROUNDS + 1):
            progress(report(number))
        return (time.thread_time() - started) / ROUNDS


def per_second(screen: Screen) -> float:
    """Return the processor seconds a second that redrawing takes while no round ends."""
    with Progress(Console(), ROUNDS, screen=screen) as progress:
        progress(report(1))
        started, clock = time.process_time(), time.perf_counter()
        time.sleep(SECONDS)
        return (time.process_time() - started) / (time.perf_counter() - clock)


def reporting() -> float:
    """Return the processor seconds that making a report takes, which is none of the display's."""
    started = time.thread_time()
    for number in range(1, ROUNDS + 1):
        report(number)
    return (time.thread_time() - started) / ROUNDS


def main() -> None:
    """Measure and print."""
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        screen = Screen(file=nothing, force_terminal=True, width=120)
        own = reporting()
        bar, redraw = per_round(screen) - own, per_second(screen)
        with stderr_to_nothing():
            lines = per_round(None) - own
    print(f"bar: {bar * 1e6:.0f} us a round and {redraw:.2%} of a second; lines: {lines * 1e6:.0f} us a round")
    for round_s in ROUND_S:
        print(f"rounds of {round_s * 1e3:g} ms: bar {bar / round_s + redraw:.2%}, lines {lines / round_s:.2%}")


if __name__ == "__main__":
    main()
