"""The benchmarks measure what they say they do; how fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import aggregate, secagg
from benchmarks.compare import Contender, Result, contenders, memory_ratios, ratios, result_of
from benchmarks.measuring import Peak, Rounds, print_properties
from benchmarks.secagg_roofline import Roofline, taking_turns
from benchmarks.secagg_simulated import training, virtual
from benchmarks.secagg_sum import SecureSum, take
from benchmarks.simulate import Slices, engine_named, measure
from benchmarks.workloads import WORKLOADS, Workload
from fedml_core.errors import ConfigError
from simulations import Fused, Processes, Sequential
from strategies import SecAggPlus
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


def test_properties_are_run_in_turn_and_printed_as_one_line_with_what_was_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: dict[str, object] = {"a1": {"1": 0.5}, "a2": 7}
    calls: list[str] = []

    def check(name: str) -> object:
        calls.append(name)
        return found[name]

    print_properties({"bench": "properties", "keys": 3}, {name: partial(check, name) for name in found})
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert calls == ["a1", "a2"] and row["bench"] == "properties" and row["keys"] == 3
    assert row["a1"] == {"1": 0.5} and row["a2"] == 7 and row["a1_cpu_s"] >= 0 and "processors" in row


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
    assert [result_of(one, 60) for one in (broken, silent, missing)] == [None, None, None]
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "broken failed: no such peer",
        "silent failed: it printed nothing",
        "missing failed: FileNotFoundError",
    ]


def test_a_run_is_judged_by_the_line_that_it_printed_last() -> None:
    lines = [json.dumps({"workload": "w", "samples_per_s": rate, "rss_mb": 4 * rate}) for rate in (5.0, 7.0)]
    said = Contender("said", "pfl", (sys.executable, "-c", f"print({lines[0]!r}, {lines[1]!r}, 'bye', sep=chr(10))"))
    assert result_of(said, 60) == Result(7.0, 28.0)


def test_memory_is_compared_between_what_is_spread_over_all_processors() -> None:
    rows = contenders("logreg", {"pfl": "a/python", "flower": "b/python"})
    ours, pfl, flower = spread = [row for row in rows if row.spread]
    assert [row.kind for row in spread] == ["ours", "pfl", "flower"] and "processes" in ours.name
    memory: dict[str, list[float | None]] = {row.name: [1.0, 1.0, 1.0] for row in rows}
    memory.update({ours.name: [300.0, 500.0, None], pfl.name: [600.0, 800.0, 1.0], flower.name: [None] * 3})
    assert memory_ratios(memory, rows) == {"pfl": [0.562, 0.5, 0.625]}
    assert memory_ratios(memory, contenders("logreg", {"pfl": "a/python", "flower": None}, ["fused"])) == {}


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


@pytest.mark.parametrize(("clients", "masks"), [(8, 7 + 7), (104, None)])
def test_a_secure_sum_is_measured_with_real_sessions(clients: int, masks: int | None) -> None:
    row = take(SecureSum(clients, 500, 1, SecAggPlus(corrupt_share=0.05, dropout_share=0.3, attempts=1)))
    stages = {"advertise", "share", "mask", "confirm", "unmask"}
    assert row["client_stage_s"].keys() == row["server_stage_s"].keys() == stages
    assert row["client_masks"] == row["degree"] + 1
    # The lost client's masks are those with the seven others, or with its neighbours.
    assert row["server_masks"] == (masks or clients - 1 + row["degree"])
    # A step of the ring is 2^-25 of the weighted range for 8 clients, 2^-21 for 120.
    assert 4 * 500 < row["upload_bytes"] <= row["upload_bytes_allowed"] and row["max_abs_error"] < 1e-5


def test_a_secure_sum_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer dropouts than clients, got 500, 4, 1 and 4"):
        SecureSum(4, 500, 4, SecAggPlus())


def test_the_roofline_adds_as_many_masks_as_it_is_asked_for() -> None:
    roofline = Roofline(200_000)
    roofline.expand(0)
    assert not roofline._total.any()
    roofline.expand(1)
    # 200,000 uniform words of 32 bits: that 100 of them are zero has no chance.
    assert np.count_nonzero(roofline._total) > 199_900 and roofline.seconds(2) >= 0


def test_works_take_turns_after_a_first_for_nothing() -> None:
    turns: list[str] = []
    taken = taking_turns([lambda: turns.append("a"), lambda: turns.append("b")], 3)
    assert turns == ["a", "b"] * 4 and len(taken) == 2


def test_masks_and_shares_are_measured_alone() -> None:
    masks = secagg.masking(10_000, 3, 3)
    assert masks["of_roofline"] > 0 and masks["neighbours"] == 3
    assert secagg.shares(10, 7, 20, 1)["reconstruct_s"] >= 0


def test_a_protocol_is_named_as_in_a_run_toml_and_tried_once() -> None:
    assert secagg.protocol_named('{name = "SecAggPlus", active = false}') == SecAggPlus(active=False, attempts=1)
    with pytest.raises(ConfigError, match="--protocol"):
        secagg.protocol_named("SecAggMinus")


def test_a_round_of_virtual_clients_is_measured_whole() -> None:
    row = virtual(30, 100, 0.1, SecAggPlus(corrupt_share=0.05, attempts=1))
    assert 20 < row["survivors"] <= row["members"] <= 30 and row["upload_bytes"] > 0
    with pytest.raises(ConfigError, match="multiple of 10"):
        virtual(30, 101, 0.1, SecAggPlus())


def test_training_is_measured_in_the_clear_and_in_secure_sums() -> None:
    row = training(SMALL, Sequential(), 1, 1)
    assert row["round_s"].keys() == {"plain", "without_masks", "with_masks"}
    assert row["expansions"] == SMALL.cohort * (SMALL.cohort + 1) and row["cohort"] == SMALL.cohort


def test_the_client_of_flower_does_its_own_steps() -> None:
    row = secagg.flower(sys.executable, 4, 3, 100)
    assert list(row["client_stage_s"]) == ["setup", "share_keys", "collect_masked_vectors", "unmask"]
    # It sends 8 bytes for each parameter.
    assert row["upload_bytes"] > 8 * 100


def test_a_python_that_cannot_measure_flower_is_said() -> None:
    with pytest.raises(ConfigError, match="no-such-python does not measure Flower: FileNotFoundError"):
        secagg.flower(str(ROOT / "no-such-python"), 4, 3, 100)
    with pytest.raises(ConfigError, match="does not measure Flower: .*threshold"):
        secagg.flower(sys.executable, 4, 9, 100)
