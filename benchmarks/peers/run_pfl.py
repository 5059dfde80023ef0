"""The workloads in pfl: its simulated backend with federated averaging, one process or several.

One process: python -m benchmarks.peers.run_pfl --workload W. Several: start it with torch.distributed.run and say
--threads 1.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.selector import get_default_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional as F

from benchmarks.measuring import Peak, Rounds, print_line, since_start
from benchmarks.workloads import BATCH_SIZE, WORKLOADS, Workload

_WARM_UP = 2


class _Cohorts:
    """Yields the clients of one cohort after the other."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self._waiting, self.drawn = workload, list[int](), list[list[int]]()

    def __call__(self) -> int:
        if not self._waiting:
            self.drawn.append(self._workload.draw(len(self.drawn)))
            self._waiting = list(self.drawn[-1])
        return self._waiting.pop()


class _Clock(TrainingProcessCallback):  # type: ignore[misc]  # pfl carries no annotations
    """Notes when each round ends."""

    def __init__(self, peak: Peak) -> None:
        self.ends: list[float] = []
        self.startup_s, self._peak = 0.0, peak

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
        """Go on, always."""
        if not self.ends:
            self.startup_s = since_start()
        if len(self.ends) == _WARM_UP - 1:
            self._peak.look()
            self._peak.pause()
        self.ends.append(time.perf_counter())
        return False, Metrics()


def _model(workload: Workload, *, channels_last: bool) -> Any:
    torch.manual_seed(0)
    module: Any = workload.model()
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    module.loss = lambda inputs, targets: F.cross_entropy(module(inputs), targets)
    module.metrics = lambda inputs, targets: {}
    central = torch.optim.SGD(module.parameters(), 1.0)
    return PyTorchModel(model=module, local_optimizer_create=torch.optim.SGD, central_optimizer=central)


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    workload = WORKLOADS[asked.workload]
    channels_last = asked.channels_last and len(workload.shape) == 3
    if channels_last:
        inputs, labels = workload.examples
        workload.__dict__["examples"] = (inputs.to(memory_format=torch.channels_last), labels)
    world = get_default_framework_module().distributed
    # The launcher of several processes is their parent; all of them count.
    peak = Peak(os.getppid() if world.world_size > 1 else None)
    clock, cohorts = _Clock(peak), _Cohorts(workload)
    data = FederatedDataset(lambda client: Dataset(workload.client(client), user_id=str(client)), cohorts)
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    total = asked.rounds + _WARM_UP
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=total,
            evaluation_frequency=10**9,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=_model(workload, channels_last=channels_last),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=workload.learning_rate, local_num_epochs=1, local_batch_size=BATCH_SIZE
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    if world.global_rank == 0:
        measured = range(_WARM_UP, total)
        samples = [float(workload.counts(workload.draw(number)).sum()) for number in measured]
        seconds = [clock.ends[number] - clock.ends[number - 1] for number in measured]
        name = f"pfl-p{world.world_size}-t{asked.threads}" + ("-cl" if channels_last else "")
        rounds = Rounds(seconds, samples, clock.startup_s)
        print_line(rounds.line(workload.name, name, workload.round_examples, peak.megabytes()))


if __name__ == "__main__":
    main()
