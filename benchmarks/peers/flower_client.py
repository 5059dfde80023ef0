"""The client of `run_flower`, in a module of its own so that its workers find it by name."""

from __future__ import annotations

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional as F

from benchmarks.workloads import BATCH_SIZE, WORKLOADS, Workload

__all__ = ["WORKLOAD", "app"]

WORKLOAD = "FEDVEIL_BENCH_WORKLOAD"
"""The environment variable that names the workload to the workers."""

app = ClientApp()


@cache
def _kept() -> tuple[Workload, nn.Module]:
    torch.set_num_threads(1)
    workload = WORKLOADS[os.environ[WORKLOAD]]
    return workload, workload.model()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the node's slice."""
    workload, model = _kept()
    inputs, labels = workload.client(int(context.node_config["partition-id"]))
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    model.load_state_dict(arrays.to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.learning_rate)
    for x, y in zip(inputs.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(inputs)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
