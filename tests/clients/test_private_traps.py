"""Traps of DP-SGD: ways in which an example could weigh more than it may, or a parameter escape the noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.gradient_modes import Bookkeeping
from clients.gradient_pieces import Outer, Piece, Positions, Rows
from clients.opacus_modes import OpacusGhost
from clients.per_example import Clip, UnsuitedError, clipped_rows, finite_rows, lengths
from clients.private_model import check_mode
from fedml_core.data import Examples
from fedml_core.errors import TaskError
from fedml_core.training import Training
from tests.clients.private_cases import (
    MODELS,
    batch_of,
    built,
    dense,
    gradients,
    joined,
    private_of,
    trained,
    trainer_of,
)
from tests.clients.test_per_example import MODES, taken
from tests.clients.trainer_cases import KEY, classification, drawn, labelled

SILENT = {"noise_multiplier": 1e-6, "sampling_rate": 1.0}
ONE_STEP = Training(steps=1, batch_size=1, learning_rate=1.0)


def influence(mode: str, model: Any, inputs: Tensor, weight: float, target: int, norm: float) -> float:
    """Return how far one example alone moves the sum."""
    module, losses = built(model)
    batch = (inputs,), torch.tensor([target]), torch.tensor([weight])
    return float(taken(MODES[mode](module, losses), batch, Clip(norm)).double().norm())


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_weight_and_a_huge_input_are_cut_like_any_other_gradient(mode: str) -> None:
    # The square of 1e-23 is no float32 number, and the one of 1e18 is: their product is not 0 times anything.
    module, losses = built(dense)
    huge, weight = drawn(1, 5) * 1e18, 1e-23
    true = []
    for target in range(3):
        batch = (huge,), torch.tensor([target]), torch.tensor([weight])
        true.append(float(gradients(module, losses, batch)[0].double().norm()))
        assert influence(mode, dense, huge, weight, target, 1e-7) <= 1e-7
    assert max(true) > 1e-6


SCALES = [1e-38, 1e-30, 1e-23, 1e-20, 1e-10, 1.0, 1e10, 1e15, 1e18]


@pytest.mark.parametrize("left", SCALES)
@pytest.mark.parametrize("right", SCALES)
def test_no_norm_is_too_small_at_any_scale(left: float, right: float) -> None:
    columns, across = drawn(4, 3, 6) * left, drawn(4, 3, 50, seed=1) * right
    columns[:, 0] *= 1e-3 / max(left, 1e-3)
    pieces: list[Piece] = [Positions(columns, across), Outer(Rows(columns[:, 1]), across[:, 1]), Rows(columns)]
    true = [
        torch.bmm(columns.double().transpose(1, 2), across.double()).flatten(1).norm(dim=1),
        columns[:, 1].double().norm(dim=1) * across[:, 1].double().norm(dim=1),
        columns.double().flatten(1).norm(dim=1),
    ]
    for piece, expected in zip(pieces, true, strict=True):
        found = piece.norms().double()
        # Below the least norm that can be asked for, nothing is cut anyway.
        enough = (found >= expected * (1 - 2.0**-12)) | (expected < 1e-13) | ~torch.isfinite(found)
        assert bool(enough.all())


def test_small_numbers_do_not_vanish_beside_a_large_one() -> None:
    row = torch.full((1, 1 << 21), 2.0**-12.6)
    row[0, :64] = 1.0
    true = float(row.double().norm())
    assert float(torch.linalg.vector_norm(row, dim=1)) < true * (1 - 2.0**-12)
    assert float(lengths(row)) == pytest.approx(true, rel=2.0**-13)
    assert float(clipped_rows([row], Clip(1.0)).sums[0].double().norm()) <= 1.0


def test_norms_that_add_up_to_infinity_are_finite_each() -> None:
    assert finite_rows(torch.full((4, 9), 3e38)) is None
    found = finite_rows(torch.tensor([[1.0, math.inf, 2.0], [math.nan, 0.0, 3e38]]))
    assert found is not None and found.tolist() == [2]


def test_a_batch_of_huge_gradients_is_cut_and_does_not_recurse() -> None:
    module, losses = built(dense)
    batch = (drawn(24, 5) * 1e15,), torch.arange(24) % 3, torch.full((24,), 1e22)
    found = taken(Bookkeeping(module, losses), batch, Clip(0.5))
    assert torch.isfinite(found).all() and float(found.norm()) <= 0.5 * 24


class Cancelling(nn.Module):
    """A dense layer over positions whose gradients are summed."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.dense = nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        shaped = values.view(len(values), *[1] * (self.places - 1), -1, 8)
        hidden = self.dense(shaped).flatten(1, -2).sum(dim=1)
        made: Tensor = self.last(hidden)
        return made


@pytest.mark.parametrize("places", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_positions_that_cancel_leave_no_example_longer_than_the_norm(mode: str, places: int) -> None:
    module, losses = built(lambda: Cancelling(places))
    one = drawn(40, 8) * 1e4
    inputs = torch.cat([one, drawn(40, 8, seed=5) - one], dim=1)
    made = MODES[mode](module, losses)
    with made.attached():
        for place in range(len(inputs)):
            batch = (inputs[place : place + 1],), torch.tensor([place % 3]), None
            found = made.clipped(batch, Clip(1e-3))
            assert float(joined(found.sums).double().norm()) <= 1e-3


def test_ghost_clipping_refuses_a_parameter_without_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    module, losses = built(dense)
    monkeypatch.setattr("clients.opacus_modes._dense_norms", lambda *_: {})
    with pytest.raises(UnsuitedError, match="no norms for a parameter that examples move"):
        taken(OpacusGhost(module, losses), batch_of(drawn(4, 5)), Clip(1.0))


@pytest.mark.parametrize("count", [17, 100])
def test_the_last_example_weighs_nothing_where_it_fills_a_batch_up(count: int) -> None:
    # 17 is filled up to 18 with the last example, which is not finite here; 100 in parts of 33 is too.
    data = labelled(count)
    data.inputs[0][-1] = math.inf
    private = private_of(max_physical_batch=33, **SILENT)
    whole = trained(trainer_of(private=private), data, ONE_STEP).values
    fewer = Examples.of(data.inputs[0][:-1], data.targets[:-1])
    assert torch.isfinite(whole).all()
    assert torch.allclose(whole, trained(trainer_of(private=private), fewer, ONE_STEP).values, atol=1e-4)


class Partly(nn.Module):
    """A used layer, one that the loss does not reach, one that is tied, an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(40, 50)
        self.second.weight = self.first.weight
        self.last = nn.Linear(5, 3)
        self.nothing = nn.Linear(4, 0)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.second(torch.relu(self.first(values))))
        return hidden


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "hooks"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_every_parameter_gets_noise_tied_ones_once_and_those_that_no_example_reaches(mode: str) -> None:
    private = private_of(noise_multiplier=2.0, sampling_rate=1.0, gradients=mode)
    trainer = trainer_of(classification(Partly), private)
    assert trainer.spec.parameter_count == 25 + 5 + 5 + (2000 + 50) + (15 + 3)
    values = trained(trainer, labelled(), ONE_STEP).values
    idle = next(tensor for tensor in trainer.spec.parameters if tensor.name == "idle.weight")
    part = values[idle.offset : idle.offset + idle.size]
    # 2,000 draws: 1.6 % in two of three cases.
    assert float(part.std()) == pytest.approx(2.0, rel=0.08) and bool(values.all())


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "hooks", "functorch"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
def test_tied_and_idle_parameters_count_once_towards_the_norm(mode: str) -> None:
    module, losses = built(Partly)
    batch = batch_of(drawn(6, 5) * 50)
    rows = gradients_of_reached(module, losses, batch)
    found = taken(MODES[mode](module, losses), batch, Clip(0.3))
    expected = torch.stack([row * min(1.0, 0.3 / float(row.norm())) for row in rows]).sum(dim=0)
    assert (found - expected).norm() < 4e-4 * expected.norm()


def gradients_of_reached(module: nn.Module, losses: Any, batch: Any) -> list[Tensor]:
    rows = []
    for place in range(len(batch[1])):
        example = (batch[0][0][place : place + 1],), batch[1][place : place + 1], None
        found = torch.autograd.grad(losses(example).sum(), list(module.parameters()), allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), found, strict=True)]
        rows.append(joined(parts))
    return rows


def _shares(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none") / len(targets)


def _hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses * (losses >= losses.detach().max())


def _balanced(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none") + outputs.mean(dim=0).square().sum()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vmap"])
@pytest.mark.parametrize("loss", [_shares, _hardest, _balanced])
def test_a_loss_that_couples_the_batch_is_refused(mode: str, loss: Any) -> None:
    private = private_of(gradients=mode)
    with pytest.raises(TaskError, match="the model or the loss mixes examples"):
        trained(trainer_of(classification(dense, loss=loss), private), labelled())


@pytest.mark.parametrize("loss", [_shares, _hardest, _balanced])
def test_one_by_one_a_loss_over_the_batch_is_that_of_each_example_alone(loss: Any) -> None:
    private = private_of(gradients="vmap", **SILENT)
    task = classification(dense, loss=loss)
    pair = [labelled(9), labelled(10)]
    pair[1].inputs[0][:9] = pair[0].inputs[0]
    pair[1].targets[:9] = pair[0].targets
    updates = [trained(trainer_of(task, private), data, ONE_STEP).values for data in pair]
    assert float((updates[1] - updates[0]).norm()) <= 1.0 + 1e-4


class Centred(nn.Module):
    """Mixes examples where no gradient passes as long as all weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.relu(self.first(values))
        made: Tensor = self.last(hidden - hidden.mean(dim=0))
        return made


def test_parameters_that_hide_how_a_model_mixes_examples_do_not_help_a_server() -> None:
    trainer = trainer_of(classification(Centred), private_of(gradients="bookkeeping"))
    with pytest.raises(TaskError, match="the model or the loss mixes examples"):
        trainer.train(torch.zeros(trainer.spec.size), labelled(), ONE_STEP, round_number=1, key=KEY)


@pytest.mark.parametrize("model", MODELS)
def test_an_example_more_at_the_front_moves_the_sum_by_no_more_than_the_norm(model: str) -> None:
    make, inputs = MODELS[model]
    module, losses = built(make)
    mode = Bookkeeping(module, losses)
    targets = torch.arange(len(inputs)) % 3
    after = taken(mode, ((inputs,), targets, None), Clip(0.05))
    before = taken(mode, ((inputs[1:],), targets[1:], None), Clip(0.05))
    assert float((after - before).norm()) <= 0.05


def test_a_weight_of_a_parameter_that_is_used_by_hand_is_not_overlooked() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dense = nn.Embedding(20, 6), nn.Linear(6, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.dense(self.table(tokens).mean(dim=1))
            return nn.functional.linear(hidden, self.table.weight)[:, :3]

    module, losses = built(Tied)
    with pytest.raises(UnsuitedError, match="Bookkeeping does not give"):
        check_mode(Bookkeeping(module, losses), module, losses, batch_of(MODELS["words"][1]))
