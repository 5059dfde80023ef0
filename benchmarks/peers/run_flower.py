"""The workloads in Flower: its message API and FedAvg in its simulation with Ray, an actor a processor."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterable
from typing import Any

# Before Flower and Ray are imported: they report home and use every processor otherwise.
os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    OMP_NUM_THREADS="1",
)

from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.measuring import Peak, Rounds, print_line, since_start
from benchmarks.peers import flower_client
from benchmarks.workloads import WORKLOADS


class _Timed(FedAvg):
    """FedAvg that notes when each round ends and how many samples it trained on."""

    def __init__(self, peak: Peak, **settings: Any) -> None:
        super().__init__(**settings)
        self.ends: list[float] = []
        self.samples: list[float] = []
        self.startup_s, self._peak = 0.0, peak

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Aggregate as ever."""
        came = list(replies)
        if failed := [reply for reply in came if reply.has_error()]:
            raise RuntimeError(f"a client failed: {failed[0].error}")
        result = super().aggregate_train(server_round, came)
        self.samples.append(sum(_examples(reply) for reply in came))
        if not self.ends:
            self.startup_s = since_start()
            self._peak.look()
            self._peak.pause()
        self.ends.append(time.perf_counter())
        return result


def _examples(reply: Message) -> float:
    record: Any = reply.content["metrics"]
    return float(record["num-examples"])


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    parser.add_argument("--population", type=int, help="instead of the workload's: Flower registers every node first")
    asked = parser.parse_args()
    workload, peak, measured = WORKLOADS[asked.workload], Peak(), []
    population = asked.population or workload.population
    os.environ[flower_client.WORKLOAD] = workload.name
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = _Timed(
            peak,
            fraction_train=workload.cohort / population,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=population,
        )
        measured.append(strategy)
        arrays = ArrayRecord(workload.model().state_dict())
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=asked.rounds + 1, timeout=3600)

    run_simulation(
        server_app=server,
        client_app=flower_client.app,
        num_supernodes=population,
        backend_config={
            "init_args": {"num_cpus": asked.actors},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    ends, samples = measured[0].ends, measured[0].samples
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    rounds = Rounds(seconds, samples[1:], measured[0].startup_s)
    name = f"flower-ray-{asked.actors}" + (f"-of-{population}" if asked.population else "")
    print_line(rounds.line(workload.name, name, workload.round_examples, peak.megabytes()))


if __name__ == "__main__":
    main()
