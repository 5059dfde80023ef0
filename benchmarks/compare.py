"""Ours beside other frameworks and the centralised limit, interleaved in one run.

python -m benchmarks.compare --passes 3 --pfl-python PATH --flower-python PATH

Every pass runs each contender once in a process of its own, so that a machine that is slower for a minute is slower for
all. A peer whose Python is not given, by argument or by FEDVEIL_BENCH_PFL and FEDVEIL_BENCH_FLOWER, is left out. Prints
a table on stderr and one JSON line: for each contender its rate and its peak memory in each pass, for each peer the
ratios of ours to it. Memory is compared between those that are spread over all processors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine, print_line
from benchmarks.workloads import WORKLOADS

__all__ = ["Contender", "Result", "contenders", "memory_ratios", "ratios", "result_of"]

_ROOT = Path(__file__).parents[1]
_PROCESSORS = machine()["processors"]
_FUSED = f'{{name="processes",workers={_PROCESSORS},inner={{name="fused"}}}}'
_LOOP = f'{{name="processes",workers={_PROCESSORS}}}'
# Rounds that take about two seconds with ours, and a few with the slowest.
_ROUNDS = {"cifar-cnn": 3, "femnist-mlp": 30, "logreg": 60}
_PEER_ROUNDS = {"cifar-cnn": 3, "femnist-mlp": 5, "logreg": 4}
_FLOWER_NODES = 1_000  # it registers every node before the first round


@dataclass(frozen=True)
class Contender:
    """One row: what it is called, which `kind` it counts for (ours, limit, pfl, flower), and its command.

    `spread`: it runs processes on all processors, so that its memory is compared.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    spread: bool = False


def contenders(workload: str, pythons: Mapping[str, str | None], ours: Sequence[str] = ()) -> list[Contender]:
    """Return who runs on `workload`; `pythons`: each peer's interpreter, or None to leave it out."""
    engines = ours or ([_LOOP] if workload == "cifar-cnn" else [_FUSED, "fused"])
    module = (sys.executable, "-m")
    asked = ("--workload", workload, "--rounds", str(_ROUNDS[workload]))
    rows = [
        Contender(engine, "ours", (*module, "benchmarks.simulate", *asked, "--engine", engine), "processes" in engine)
        for engine in engines
    ]
    limit = (*module, "benchmarks.peers.limit", *asked)
    rows.append(Contender("limit b500", "limit", (*limit, "--channels-last")))
    few = ("--workload", workload, "--rounds", str(_PEER_ROUNDS[workload]))
    if pfl := pythons.get("pfl"):
        one = ("-m", "benchmarks.peers.run_pfl", *few, "--channels-last", "--threads")
        many = ("-m", "torch.distributed.run", "--nproc_per_node", str(_PROCESSORS))
        rows.append(Contender("pfl, one process", "pfl", (pfl, *one, "1")))
        rows.append(Contender(f"pfl, {_PROCESSORS} threads", "pfl", (pfl, *one, str(_PROCESSORS))))
        rows.append(Contender(f"pfl, {_PROCESSORS} processes", "pfl", (pfl, *many, *one, "1"), spread=True))
    if flower := pythons.get("flower"):
        nodes = str(min(WORKLOADS[workload].population, _FLOWER_NODES))
        command = (flower, "-m", "benchmarks.peers.run_flower", *few, "--population", nodes)
        rows.append(Contender(f"flower, {nodes} nodes", "flower", command, spread=True))
    return rows


@dataclass(frozen=True)
class Result:
    """What one run came to: samples a second, and the peak of its memory, all of its processes together."""

    samples_per_s: float
    rss_mb: float


def result_of(contender: Contender, timeout_s: float) -> Result | None:
    """Return what one run came to, or None, with a line on stderr, if it failed."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    try:
        done = subprocess.run(
            contender.command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=_ROOT,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _failed(contender, type(error).__name__)
        return None
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"workload"'):
            found = json.loads(line)
            return Result(float(found["samples_per_s"]), float(found["rss_mb"]))
    last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
    _failed(contender, last[0])
    return None


def ratios(rates: Mapping[str, Sequence[float | None]], rows: Sequence[Contender]) -> dict[str, list[float]]:
    """Return for each kind of peer the ratio of our best to its best, pass by pass: [middle, lowest, highest].

    Example:
        >>> rows = [Contender("a", "ours", ()), Contender("b", "pfl", ())]
        >>> ratios({"a": [10.0, 12.0, None], "b": [5.0, 4.0, 4.0]}, rows)
        {'pfl': [2.5, 2.0, 3.0]}
    """
    kinds = {kind: [row.name for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)}
    best = {
        kind: [_best(column) for column in zip(*(rates[n] for n in names), strict=True)]
        for kind, names in kinds.items()
    }
    return _middles({kind: (best["ours"], best[kind]) for kind in best if kind != "ours"})


def memory_ratios(memory: Mapping[str, Sequence[float | None]], rows: Sequence[Contender]) -> dict[str, list[float]]:
    """Return for each kind of peer the ratio of our peak memory to its, of what is spread over all processors.

    Example:
        >>> rows = [Contender("a", "ours", (), True), Contender("b", "ours", ()), Contender("c", "pfl", (), True)]
        >>> memory_ratios({"a": [100.0, 110.0], "b": [50.0, 50.0], "c": [200.0, 200.0]}, rows)
        {'pfl': [0.525, 0.5, 0.55]}
    """
    spread = [row for row in rows if row.spread]
    held = {
        kind: [row.name for row in spread if row.kind == kind] for kind in dict.fromkeys(row.kind for row in spread)
    }
    least = {
        kind: [_least(column) for column in zip(*(memory[name] for name in names), strict=True)]
        for kind, names in held.items()
    }
    return _middles({kind: (least["ours"], least[kind]) for kind in least if kind != "ours" and "ours" in least})


def _middles(pairs: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]]) -> dict[str, list[float]]:
    """Return for each kind the ratios of ours to the others', pass by pass: [middle, lowest, highest]."""
    found = {}
    for kind, (ours, others) in pairs.items():
        each = [mine / other for mine, other in zip(ours, others, strict=True) if mine and other]
        if each:
            found[kind] = [round(value, 3) for value in (statistics.median(each), min(each), max(each))]
    return found


def _least(sizes: Sequence[float | None]) -> float | None:
    return min((size for size in sizes if size), default=None)


def _best(rates: Sequence[float | None]) -> float | None:
    return max((rate for rate in rates if rate), default=None)


def _failed(contender: Contender, why: str) -> None:
    print(f"{contender.name} failed: {why}", file=sys.stderr)


def _compared(workload: str, rows: Sequence[Contender], passes: int, timeout_s: float) -> dict[str, Any]:
    rates: dict[str, list[float | None]] = {row.name: [] for row in rows}
    memory: dict[str, list[float | None]] = {row.name: [] for row in rows}
    for _ in range(passes):
        for row in rows:
            result = result_of(row, timeout_s)
            rates[row.name].append(None if result is None else result.samples_per_s)
            memory[row.name].append(None if result is None else result.rss_mb)
    found, held = ratios(rates, rows), memory_ratios(memory, rows)
    print(f"\n{workload}: samples a second, middle (lowest to highest) of {passes} passes", file=sys.stderr)
    for name, column in rates.items():
        good = [rate for rate in column if rate]
        shown = f"{statistics.median(good):>12,.0f} ({min(good):,.0f} to {max(good):,.0f})" if good else "failed"
        shown += f", at most {max(size for size in memory[name] if size):,.0f} MB" if good else ""
        print(f"  {name:<60}{shown}", file=sys.stderr)
    for kind, (middle, low, high) in found.items():
        print(f"  ours / {kind}: {middle:.2f} ({low:.2f} to {high:.2f})", file=sys.stderr)
    for kind, (middle, low, high) in held.items():
        print(f"  memory of ours / {kind}: {middle:.2f} ({low:.2f} to {high:.2f})", file=sys.stderr)
    named = {"workload": workload, "passes": passes, "samples_per_s": rates, "rss_mb": memory}
    return {**named, "ours_over": found, "memory_over": held}


def main() -> None:
    """Compare what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), action="append", help="all, if left out")
    parser.add_argument("--engine", action="append", default=[], help="of ours; as in benchmarks.simulate")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of one run")
    parser.add_argument("--pfl-python", default=os.environ.get("FEDVEIL_BENCH_PFL"))
    parser.add_argument("--flower-python", default=os.environ.get("FEDVEIL_BENCH_FLOWER"))
    asked = parser.parse_args()
    if asked.passes < 1:
        parser.error(f"--passes must be >= 1, got {asked.passes}")
    pythons = {"pfl": asked.pfl_python, "flower": asked.flower_python}
    results = [
        _compared(workload, contenders(workload, pythons, asked.engine), asked.passes, asked.timeout_s)
        for workload in asked.workload or sorted(WORKLOADS)
    ]
    print_line({"results": results, **machine()})


if __name__ == "__main__":
    main()
