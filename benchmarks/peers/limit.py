"""The centralised limit: one model, plain SGD on large batches over as many samples as a round has.

No federated engine is expected to pass it where arithmetic decides; where calls into torch decide (small models), an
engine that trains many clients at once can.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measuring import Peak, Rounds, print_line, since_start
from benchmarks.workloads import WORKLOADS

_RATE = 1e-3
_STRIDE = 37  # so that rounds do not begin at the same examples


def _to_channels_last(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    workload, peak = WORKLOADS[asked.workload], Peak()
    torch.manual_seed(0)
    model, (inputs, labels) = workload.model(), workload.examples
    if asked.channels_last and inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
        _to_channels_last(model)
    parameters: list[Tensor] = list(model.parameters())

    def one_round(number: int) -> int:
        done = 0
        while done < workload.round_examples:
            count = min(asked.batch, workload.round_examples - done)
            first = (done + number * _STRIDE) % (workload.pool - count + 1)
            loss = F.cross_entropy(model(inputs[first : first + count]), labels[first : first + count])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-_RATE)
            done += count
        return done

    one_round(0)
    startup_s = since_start()
    one_round(1)
    peak.pause()
    seconds, samples = [], []
    for number in range(2, asked.rounds + 2):
        started = time.perf_counter()
        samples.append(float(one_round(number)))
        seconds.append(time.perf_counter() - started)
    rounds = Rounds(seconds, samples, startup_s)
    print_line(rounds.line(workload.name, f"limit-b{asked.batch}", workload.round_examples, peak.megabytes()))


if __name__ == "__main__":
    main()
