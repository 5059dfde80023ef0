"""Whole rounds of noised secure sums over frames: what is sent, and what members refuse whatever the server says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.ledger import ledger_of
from fedml_core.errors import RunError
from fedml_core.messages import Assignment, Refusal, SecureAnswer, SecureWork
from fedml_core.model import ModelSpec
from fedml_core.privacy.clipping import ClipByNorm
from fedml_core.privacy.distributed_noise import noise_in
from fedml_core.ring import Encoding
from fedml_core.secagg.encoding import RingEncoding
from fedml_core.transform import Chain
from fedml_core.weighting import Uniform
from server.coordinator import Coordinator
from server.plan import Plan
from strategies import DistributedDP, FedAvg, SecAggPlus, SecureAggregation
from strategies.strategy import Strategy
from tests.clients.test_gate_secure import gated
from tests.doubles import PullChannel
from tests.secure_cases import Keys, SecureChannel, Tamper, secure_coordinator

SIZE, COUNT = 40, 6
KEYS = Keys(COUNT)
PROTOCOL = SecAggPlus(corrupt_share=0.2, minimum=5)


def noised(bits: int = 16, noise_multiplier: float = 0.01, inner: Strategy | None = None) -> DistributedDP:
    mean = inner or FedAvg(weighting=Uniform())
    return DistributedDP(mean, 1e3, noise_multiplier, 1e-3, SIZE, COUNT, 4, bits)


@dataclass(frozen=True)
class Careless(SecureAggregation):
    """A server that does not care how much noise is left when it asks for sums of two clients."""

    def encoding(self, clients: int, clip: float, metrics: Sequence[str]) -> Encoding:
        """Return the encoding without a look at the protocol."""
        noise = noise_in(self.pipeline())
        assert noise is not None
        return noise.encoding()

    def _require_noise(self, noise: object) -> None:
        """Accept."""


def in_the_clear(strategy: Strategy) -> torch.Tensor:
    channel = PullChannel(COUNT, SIZE)
    spec = channel.trainer.spec
    coordinator = Coordinator(Plan(strategy), spec, Coordinator.begin(Plan(strategy), spec, torch.zeros(SIZE), "a-run"))
    list(coordinator.rounds(channel, 1))
    return coordinator.state.parameters


@pytest.mark.parametrize(("bits", "vector_bytes"), [(16, 80), (20, 112), (32, 160)])
@pytest.mark.parametrize("active", [True, False])
def test_a_round_over_frames_comes_to_the_noised_mean(bits: int, vector_bytes: int, active: bool) -> None:
    strategy = SecureAggregation(noised(bits), SecAggPlus(corrupt_share=0.2, minimum=5, active=active))
    coordinator = secure_coordinator(strategy, channel := SecureChannel(KEYS, SIZE))
    reports = list(coordinator.rounds(channel, 1))
    assert reports[0].status == "ok" and reports[0].replies == COUNT and reports[0].metrics["train"] == {}
    residual = coordinator.state.parameters - in_the_clear(FedAvg(weighting=Uniform()))
    # 6 shares of 10 / sqrt(4) over a mean of 6, and what rounding a unit of 1000 to 16 bits adds; 40 draws are coarse.
    assert 0.6 < float(residual.std()) / (10 * (6 / 4) ** 0.5 / 6) < 1.6
    vectors = [
        reply.body.vector for stage, _, reply in channel.seen if isinstance(reply.body, SecureAnswer) if stage == "mask"
    ]
    # Forty coordinates are a length that can be rotated: nothing is padded.
    assert [vector.nbytes for vector in vectors if vector is not None] == [vector_bytes] * COUNT


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "unmask"])
def test_a_client_lost_at_any_exchange_leaves_the_noise_of_those_that_stay(stage: str) -> None:
    lost = [(1, stage, 2)]
    coordinator = secure_coordinator(
        SecureAggregation(noised(), PROTOCOL), channel := SecureChannel(KEYS, SIZE, lost=lost)
    )
    assert [report.status for report in coordinator.rounds(channel, 1)] == ["ok"]


def test_below_the_minimum_the_round_is_void_and_nothing_is_revealed() -> None:
    lost = [(1, "mask", 2), (1, "mask", 3)]
    coordinator = secure_coordinator(
        SecureAggregation(noised(), PROTOCOL), channel := SecureChannel(KEYS, SIZE, lost=lost)
    )
    with pytest.raises(RunError, match="all 1 rounds were void"):
        list(coordinator.rounds(channel, 1))
    assert "unmask" not in [stage for _, stage in channel.exchanges]
    assert torch.equal(coordinator.state.parameters, torch.zeros(SIZE))


@pytest.mark.parametrize(
    "protocol", [SecAggPlus(corrupt_share=0.2, minimum=2), SecAggPlus(corrupt_share=0.4, minimum=5)]
)
def test_members_refuse_a_server_that_could_reveal_a_sum_with_too_little_noise(protocol: SecAggPlus) -> None:
    coordinator = secure_coordinator(Careless(noised(), protocol), channel := SecureChannel(KEYS, SIZE))
    with pytest.raises(RunError):
        list(coordinator.rounds(channel, 1))
    assert [stage for _, stage in channel.exchanges] == ["advertise", "share"] * protocol.attempts
    refusals = [reply.body for stage, _, reply in channel.seen if stage == "share"]
    assert refusals and all("honest ones, and 4 are needed" in repr(body) for body in refusals)


def test_every_attempt_has_a_rotation_of_its_own() -> None:
    strategy = SecureAggregation(noised(), PROTOCOL)
    tables = [strategy.encoding(COUNT, 1.0, ("examples",)) for _ in range(2)]
    assert tables[0] != tables[1] and tables[0].scalars == ()


def test_a_model_of_another_size_has_no_first_round() -> None:
    strategy = SecureAggregation(noised(), PROTOCOL)
    with pytest.raises(Exception, match="the model has 41; set size=41"):
        strategy.init(ModelSpec.of_size(41))
    assert np.isclose(strategy.encoding(COUNT, 1.0, ()).length(SIZE), SIZE)


@dataclass(frozen=True)
class Silent(Careless):
    """A server whose sums add no noise, whatever its work says."""

    def encoding(self, clients: int, clip: float, metrics: Sequence[str]) -> Encoding:
        """Return an encoding of reals with as many elements."""
        return RingEncoding(1e3, clients)


def without_noise(stage: str, client: int, assignment: Assignment) -> Assignment:
    """Return an assignment whose work names the clipping alone."""
    work = assignment.work
    if stage != "mask" or not isinstance(work, SecureWork) or work.train is None:
        return assignment
    named = dataclasses.replace(work.train, pipeline=Chain((Chain(), ClipByNorm(1e3), Chain())))
    return dataclasses.replace(assignment, work=dataclasses.replace(work, train=named))


@pytest.mark.parametrize(
    ("strategy", "tamper"),
    [(Silent(noised(), PROTOCOL), None), (SecureAggregation(noised(), PROTOCOL), without_noise)],
    ids=["noise in the work alone", "noise in the sum alone"],
)
def test_members_refuse_a_sum_that_adds_other_noise_than_its_work_names(
    strategy: SecureAggregation, tamper: Tamper | None
) -> None:
    coordinator = secure_coordinator(strategy, channel := SecureChannel(KEYS, SIZE, tamper=tamper))
    with pytest.raises(RunError):
        list(coordinator.rounds(channel, 1))
    bodies = [reply.body for stage, _, reply in channel.seen if stage == "mask"]
    assert len(bodies) == COUNT * PROTOCOL.attempts
    assert all(isinstance(body, Refusal) and body.rule == "distributed_noise" for body in bodies)


def test_a_site_that_wants_distributed_noise_takes_part_and_writes_its_cost_down(tmp_path: Path) -> None:
    channel = SecureChannel(KEYS, SIZE)
    floor = {"minimum_noise_multiplier": 0.01, "maximum_clip_norm": 1e3}
    config = gated(tmp_path, channel, 1, accept=["distributed"], distributed=floor)
    gated(tmp_path, channel, 2, accept=["distributed"], distributed={"minimum_noise_multiplier": 0.02})
    strategy = SecureAggregation(noised(), PROTOCOL)
    report = next(secure_coordinator(strategy, channel).rounds(channel, 1))
    assert 1 in report.participants and 2 not in report.participants
    assert [(row.client, "minimum_noise_multiplier" in row.reason) for row in report.excluded] == [(2, True)]
    (entry,) = ledger_of(config).entries()
    event = strategy.pipeline().event()
    assert event is not None and entry.event == event and "distributed" in entry.protection
