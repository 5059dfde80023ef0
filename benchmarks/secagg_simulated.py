"""Simulated rounds under secure aggregation: what thousands of virtual clients take, and what masks add to training."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import Peak
from benchmarks.secagg_roofline import Roofline
from benchmarks.simulate import SlicedSimulation
from benchmarks.workloads import BATCH_SIZE, Workload
from fedml_core import Task, Training
from fedml_core.errors import ConfigError, SecureAggregationError
from fedml_core.model import ModelSpec
from fedml_core.task import cross_entropy
from server import FixedSampling
from simulations.engines import Engine
from simulations.faults import Faults
from strategies import FedAvg
from strategies.secure import SecAggPlus, SecureAggregation
from strategies.strategy import Strategy

__all__ = ["training", "virtual"]

_CLASSES = 10
_CLIP = 1.0


def virtual(clients: int, parameters: int, lost_share: float, protocol: SecAggPlus) -> dict[str, Any]:
    """Return what one round of virtual clients took, each with a real session, lost at any of the exchanges.

    Raises: SecureAggregationError: if the round gave no sum. ConfigError: for a size that no linear model has.
    """
    features = parameters // _CLASSES - 1
    if features < 1 or parameters % _CLASSES:
        raise ConfigError(f"virtual clients train a linear model of a multiple of 10 from 20 on, got {parameters}")

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(features, _CLASSES))

    workload = Workload("linear", model, (features,), clients, clients, fewest=1, most=3, pool=16)
    strategy = SecureAggregation(FedAvg(), protocol, clip=_CLIP, max_weight=workload.most)
    peak = Peak()
    simulation = _simulation(workload, strategy, Engine.from_config("fused"), 1, Faults(drop=lost_share))
    started, cpu = time.perf_counter(), time.process_time()
    report = simulation.run().reports[-1]
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    peak.pause()
    if report.status != "ok" or report.secure is None:
        raise SecureAggregationError(report.why or "the round gave no sum")
    facts = ("members", "survivors", "degree", "threshold", "quorum", "stage_seconds")
    return {
        **{name: report.secure[name] for name in facts},
        "minutes": round(seconds / 60, 2),
        "cpu_minutes": round(cpu_s / 60, 2),
        "rss_mb": round(peak.megabytes()),
        "upload_bytes": report.bytes_up // clients,
        "download_bytes": report.bytes_down // clients,
    }


def training(workload: Workload, engine: Engine, passes: int, rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of a training round in the clear, and under secure sums without and with masks.

    The three take turns, `passes` times; of each, `rounds` rounds are measured after a first. CPU seconds are those of
    this process, so an engine with workers of its own is none to measure by them.
    """
    secure = SecureAggregation(
        FedAvg(), SecAggPlus(corrupt_share=0.05, attempts=1), clip=_CLIP, max_weight=workload.most, draw_masks=False
    )
    variants: dict[str, Strategy] = {
        "plain": FedAvg(),
        "without_masks": secure,
        "with_masks": dataclasses.replace(secure, draw_masks=True),
    }
    size = ModelSpec.of(workload.model()).size
    roofline, mask_s = Roofline(size), list[float]()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    walls: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(passes):
        for name, strategy in variants.items():
            mask_s.append(roofline.seconds(10))
            cpu_s, wall_s = _seconds(workload, strategy, engine, rounds)
            seconds[name].append(round(cpu_s, 3))
            walls[name].append(round(wall_s, 3))
    # Everybody masks with everybody and with itself; the server takes the masks of seeds off.
    expansions = workload.cohort * workload.cohort + workload.cohort
    plain, without, masked = (statistics.median(seconds[name]) for name in variants)
    all_masks = statistics.median(mask_s) * expansions
    return {
        "workload": workload.name,
        "parameters": size,
        "cohort": workload.cohort,
        "engine": engine.name,
        "round_s": seconds,
        "round_wall_s": walls,
        "without_masks_adds": round(without / plain - 1, 3),
        "with_masks_adds_s": round(masked - plain, 3),
        "expansions": expansions,
        "expansions_roofline_s": round(all_masks, 3),
        "with_masks_adds_over_roofline": round((masked - plain) / all_masks, 3),
        "threads": torch.get_num_threads(),
    }


def _seconds(workload: Workload, strategy: Strategy, engine: Engine, rounds: int) -> tuple[float, float]:
    """Return the CPU seconds and the wall seconds of one round."""
    ends: list[tuple[float, float]] = []
    history = _simulation(workload, strategy, engine, rounds + 1).run(
        callbacks=[lambda *_: ends.append((time.process_time(), time.perf_counter()))]
    )
    if any(report.status != "ok" for report in history.reports):
        raise SecureAggregationError(next(report.why for report in history.reports if report.status != "ok"))
    return (ends[-1][0] - ends[0][0]) / rounds, (ends[-1][1] - ends[0][1]) / rounds


def _simulation(
    workload: Workload, strategy: Strategy, engine: Engine, rounds: int, faults: Faults | None = None
) -> SlicedSimulation:
    return SlicedSimulation(
        Task(model=workload.model, loss=cross_entropy, classes=workload.classes),
        strategy,
        clients=workload.population,
        rounds=rounds,
        sampling=FixedSampling(workload.cohort),
        training=Training(batch_size=BATCH_SIZE, learning_rate=workload.learning_rate),
        engine=engine,
        faults=faults or Faults(),
        device="cpu",
        workload=workload,
    )
