"""The benchmarks measure what they say they do; how fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import aggregate
from benchmarks.compare import Contender, contenders, rate_of, ratios
from benchmarks.measuring import Peak, Rounds
from benchmarks.simulate import Slices, engine_named, measure
from benchmarks.workloads import WORKLOADS, Workload
from fedml_core.errors import ConfigError
from simulations import Fused, Processes, Sequential
from tests.sources import ROOT

SMALL = dataclasses.replace(WORKLOADS["logreg"], population=40, cohort=6, pool=200)
LINE = {"workload", "engine", "samples_per_s", "sec_per_round", "startup_s", "rss_mb", "rounds", "processors", "torch"}


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_every_client_holds_a_slice_of_the_pool_of_an_allowed_length(workload: Workload) -> None:
    clients = np.arange(workload.population)
    counts, starts = workload.counts(clients), workload.starts(clients)
    assert counts.min() == workload.fewest and counts.max() == workload.most
    assert starts.min() >= 0 and (starts + counts).max() <= workload.pool
    cohort = workload.draw(3)
    assert len(set(cohort)) == workload.cohort and cohort == workload.draw(3) != workload.draw(4)


def test_packed_slices_are_the_clients_own() -> None:
    population, asked = Slices(SMALL), [3, 17, 5]
    packed = population.pack(asked)
    for place, client in enumerate(asked):
        rows = slice(int(packed.offsets[place]), int(packed.offsets[place + 1]))
        alone: Any = population.load(client).train
        assert torch.equal(packed.examples.inputs[0][rows], alone.inputs[0])
        assert torch.equal(packed.examples.targets[rows], alone.targets)


@pytest.mark.parametrize("engine", [Sequential(), Fused()], ids=lambda engine: str(engine.name))
def test_measured_rounds_are_whole_rounds_of_the_workload(engine: Sequential | Fused) -> None:
    peak = Peak()
    rounds = measure(SMALL, engine, 2, peak)
    assert len(rounds.seconds) == len(rounds.samples) == 2 and min(rounds.seconds) > 0
    least, most = SMALL.cohort * SMALL.fewest, SMALL.cohort * SMALL.most
    assert all(least <= samples <= most for samples in rounds.samples)
    assert rounds.startup_s > 0
    # Torch alone takes more than 50 MB.
    line = rounds.line("small", engine.name, SMALL.round_examples, peak.megabytes())
    assert line.keys() >= LINE and line["rss_mb"] > 50


def test_the_rate_is_that_of_all_rounds_together() -> None:
    line = Rounds([1.0, 3.0], [100.0, 100.0], 2.0).line("w", "e", 60, 10.0)
    assert line["samples_per_s"] == 50.0 and line["sec_per_round"] == 1.2 and line["startup_s"] == 2.0


def test_an_engine_is_named_as_in_a_run_toml() -> None:
    assert engine_named("fused") == Fused()
    assert engine_named('{name = "processes", workers = 2}') == Processes(workers=2)
    with pytest.raises(ConfigError, match="unknown engine 'warp'"):
        engine_named("warp")


def test_the_limit_runs_where_nothing_of_ours_is_installed() -> None:
    blocked = "import sys\nfor name in ('fedml_core', 'simulations', 'server', 'clients', 'strategies'):\n"
    blocked += "    sys.modules[name] = None\nimport runpy\nsys.argv[1:] = ['--workload', 'logreg', '--rounds', '1']\n"
    blocked += "runpy.run_module('benchmarks.peers.limit', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=ROOT, check=True)
    line = json.loads(done.stdout)
    assert line.keys() >= LINE and line["engine"] == "limit-b500" and line["rounds"] == 1


def test_a_peer_runs_only_where_its_python_is_given() -> None:
    kinds = {row.kind for row in contenders("logreg", {"pfl": None, "flower": None})}
    assert kinds == {"ours", "limit"}
    rows = contenders("logreg", {"pfl": "a/python", "flower": "b/python"}, ["auto"])
    assert {row.kind for row in rows} == {"ours", "limit", "pfl", "flower"}
    assert {row.command[0] for row in rows if row.kind == "pfl"} == {"a/python"}
    assert [row.name for row in rows if row.kind == "ours"] == ["auto"]


def test_a_contender_that_fails_is_said_and_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    broken = Contender("broken", "pfl", (sys.executable, "-c", "raise SystemExit('no such peer')"))
    silent = Contender("silent", "pfl", (sys.executable, "-c", ""))
    missing = Contender("missing", "pfl", (str(ROOT / "no-such-python"),))
    assert [rate_of(one, 60) for one in (broken, silent, missing)] == [None, None, None]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "broken failed: no such peer",
        "silent failed: it printed nothing",
        "missing failed: FileNotFoundError",
    ]


def test_ratios_are_of_the_best_to_the_best_pass_by_pass() -> None:
    rows = [Contender(name, kind, ()) for name, kind in (("a", "ours"), ("b", "ours"), ("c", "limit"), ("d", "pfl"))]
    rates: Mapping[str, list[float | None]] = {
        "a": [8.0, 30.0, 10.0],
        "b": [10.0, None, 40.0],
        "c": [20.0, 20.0, 20.0],
        "d": [None, None, None],
    }
    assert ratios(rates, rows) == {"limit": [1.5, 0.5, 2.0]}


def test_the_server_holds_few_models_however_many_replies_come() -> None:
    few = aggregate.measure(2_000_000, 2)
    many = aggregate.measure(2_000_000, 60)
    # 60 replies of 8 MB would be 60 models; the peak may have been reached before.
    assert many["models"] <= 3 and few["seconds"] > 0
