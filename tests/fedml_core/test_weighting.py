"""Which pipelines only weigh, and what they then make of clients' reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedml_core import Draws, Transform, Update, chain
from fedml_core.compression import StochasticQuantize
from fedml_core.errors import ReplyError
from fedml_core.transform import State
from fedml_core.weighting import ByExamples, ByMetric, Scaling, Uniform, Weigh, Weighting, scaled_reports, scales_only

REPORTS = Update(
    torch.empty(2, 0),
    torch.ones(2, dtype=torch.float64),
    {
        "examples": torch.tensor([2.0, 8.0], dtype=torch.float64),
        "loss": torch.tensor([6.0, 4.0], dtype=torch.float64),
    },
)


@dataclass(frozen=True)
class Louder(ByExamples):
    """Says nothing of values, and reads them: its parent's word does not count."""

    def weight(self, update: Update) -> Tensor:
        return update.values.square().sum(dim=-1).double()


@dataclass(frozen=True)
class Quiet(Weighting):
    """A user's own weighting that says that it reads no values."""

    reads_values: ClassVar[bool] = False

    def weight(self, update: Update) -> Tensor:
        return update.sums["examples"].sqrt()


@dataclass(frozen=True)
class Renamed(Quiet):
    """Inherits `weight` with what was said about it."""


@dataclass(frozen=True)
class Rounded(Weigh):
    """Weighs, and then does something else."""

    def encode(self, update: Update, told: State, memory: State, draws: Draws) -> tuple[Update, State]:
        update, memory = super().encode(update, told, memory, draws)
        return update.replace(values=update.values.round()), memory


@dataclass(frozen=True)
class Halving(Scaling):
    """Scales by a constant."""

    def factor(self, update: Update) -> Tensor:
        return torch.full(update.lead, 0.5, dtype=torch.float64)

    def ignores_values(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        (chain(), True),
        (Weigh(), True),
        (chain(Weigh(Uniform())), True),
        (chain(Weigh(ByMetric("loss")), Transform()), True),
        (chain(Weigh(Quiet())), True),
        (chain(Weigh(Renamed())), True),
        (chain(Halving(), Weigh()), True),
        (chain(Weigh(Louder())), False),
        (chain(Weigh(Weighting())), False),
        (chain(Weigh(), StochasticQuantize(4)), False),
        (Rounded(), False),
    ],
    ids=repr,
)
def test_a_pipeline_only_scales_if_nothing_in_it_sees_values(pipeline: Transform, expected: bool) -> None:
    assert scales_only(pipeline) is expected


@pytest.mark.parametrize(
    ("pipeline", "factors", "weights"),
    [
        (chain(), [1, 1], [1, 1]),
        (Weigh(), [2, 8], [2, 8]),
        (Weigh(Uniform()), [1, 1], [1, 1]),
        (Weigh(ByMetric("loss", 2.0)), [9, 0.25], [9, 0.25]),
        (chain(Halving(), Weigh()), [1, 4], [2, 8]),
    ],
    ids=repr,
)
def test_reports_and_factors_are_what_encoding_makes_of_them(
    pipeline: Transform, factors: list[float], weights: list[float]
) -> None:
    found, reports = scaled_reports(pipeline, REPORTS)
    assert (found.tolist(), reports.weight.tolist()) == (factors, weights)
    values = torch.tensor([[1.0, -2.0], [4.0, 3.0]])
    encoded, _ = pipeline.encode(REPORTS.replace(values=values), {}, {}, Draws.each([(1,), (2,)]))
    assert torch.equal(encoded.values, values * found[:, None].float())
    assert torch.equal(encoded.weight, reports.weight)


def test_a_metric_that_nobody_reports_is_said() -> None:
    with pytest.raises(ReplyError, match="reports no 'accuracy' to weigh by; it reports examples, loss"):
        scaled_reports(Weigh(ByMetric("accuracy")), REPORTS)
