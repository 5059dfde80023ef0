"""Clipped sums: what one example can add, and that every way of taking them gives the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.gradient_choice import choose_mode
from clients.gradient_modes import Bookkeeping, Vmapped
from clients.gradient_pieces import Lookup, Positions
from clients.opacus_modes import OpacusGhost, OpacusHooks
from clients.per_example import Clip, GradientMode, LossOf, UnsuitedError, clipped_rows
from clients.private_model import check_mode
from fedml_core.errors import TaskError
from fedml_core.minibatches import Batch
from tests.clients.private_cases import MODELS, Images, batch_of, built, dense, gradients, joined
from tests.clients.trainer_cases import drawn

Made = Callable[[nn.Module, LossOf], GradientMode]
MODES: dict[str, Made] = {
    "bookkeeping": Bookkeeping,
    "vmap": Vmapped,
    "hooks": OpacusHooks,
    "functorch": partial(OpacusHooks, functorch=True),
    "ghost": OpacusGhost,
}


def taken(mode: GradientMode, batch: Batch, clip: Clip) -> Tensor:
    with mode.attached():
        return joined(mode.clipped(batch, clip).sums)


# Opacus refuses ghost clipping of a layer that is used twice.
CASES = [(mode, model) for mode in MODES for model in MODELS if (mode, model) != ("ghost", "twice")]


@pytest.mark.parametrize(("mode", "model"), CASES)
def test_every_mode_gives_the_sum_of_gradients_that_are_clipped_one_by_one(mode: str, model: str) -> None:
    make, inputs = MODELS[model]
    module, losses = built(make)
    batch = batch_of(inputs, torch.linspace(0.2, 2.0, len(inputs)))
    rows = gradients(module, losses, batch)
    # The middle norm: some examples are clipped, some are not.
    norm = float(torch.stack([row.norm() for row in rows]).median())
    expected = torch.stack([row * min(1.0, norm / float(row.norm())) for row in rows]).sum(dim=0)
    found = taken(MODES[mode](module, losses), batch, Clip(norm))
    # 2^-12 is what clipping stays inside by; the rest is float32.
    assert (found - expected).norm() < 4e-4 * expected.norm()


@pytest.mark.parametrize("model", MODELS)
def test_bookkeeping_and_vmap_equal_opacus_to_five_digits(model: str) -> None:
    make, inputs = MODELS[model]
    module, losses = built(make)
    batch = batch_of(inputs)
    for clip in (Clip(0.3), Clip(0.3, apart=True)):
        reference = taken(OpacusHooks(module, losses), batch, clip)
        for ours in (Bookkeeping(module, losses), Vmapped(module, losses)):
            assert (taken(ours, batch, clip) - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_opacus_leaves_no_trace_in_the_module(mode: str) -> None:
    module, losses = built(dense)
    taken(MODES[mode](module, losses), batch_of(drawn(4, 5)), Clip(1.0))
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in module.parameters())
    assert not any("activations" in vars(part) for part in module.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1.0, 1e4, 1e12, 3e19, 1e30, math.inf, math.nan])
def test_one_example_moves_the_sum_by_no_more_than_the_norm_whatever_it_holds(mode: str, size: float) -> None:
    # "one example moves the sum by an L2 norm of at most clip.norm, whatever it holds."
    module, losses = built(dense)
    without = drawn(8, 5)
    with_it = torch.cat([without, drawn(1, 5, seed=9) * size])
    targets = torch.arange(9) % 3
    made = MODES[mode](module, losses)
    before = taken(made, ((without,), targets[:8], None), Clip(0.1))
    after = taken(made, ((with_it,), targets, None), Clip(0.1))
    assert torch.isfinite(after).all()
    assert float((after - before).norm()) <= 0.1


@pytest.mark.parametrize("apart", [False, True])
def test_clipping_off_would_be_seen(apart: bool) -> None:
    module, losses = built(dense)
    huge = batch_of(drawn(1, 5) * 1e4)
    assert gradients(module, losses, huge)[0].norm() > 100
    assert float(taken(Bookkeeping(module, losses), huge, Clip(1.0, apart)).norm()) == pytest.approx(1.0, rel=0.7)
    assert float(taken(Bookkeeping(module, losses), huge, Clip(1.0, apart)).norm()) <= 1.0


def test_parts_are_cut_to_equal_shares_of_the_square() -> None:
    rows = [torch.full((2, 4), 10.0), torch.full((2, 9), 1e-3)]
    both = clipped_rows(rows, Clip(2.0, apart=True)).sums
    assert float(both[0].norm()) == pytest.approx(2 * 2 / math.sqrt(2), rel=1e-3)
    assert float(both[1].norm()) == pytest.approx(2 * 3e-3, rel=1e-3)


def test_an_example_that_is_not_finite_adds_nothing() -> None:
    # "each example adds a vector of L2 norm at most clip.norm; one that is not finite adds nothing."
    rows = [torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 1.0]])]
    assert clipped_rows(rows, Clip(5.0)).sums[0].tolist() == [1.0, 0.0]
    assert clipped_rows([rows[0][1:]], Clip(5.0)).sums[0].tolist() == [0.0, 0.0]


def test_norms_over_positions_are_not_too_small_where_terms_cancel() -> None:
    # Positions whose products cancel but for the last: float32 alone would find any norm at all.
    columns = torch.tensor([[[1e4], [1e4], [1.0]]])
    across = torch.tensor([[[1e4], [-1e4], [1.0]]])
    found = Positions(columns, across)
    assert float(found.norms()) ** 2 >= float(found.rows().double().square().sum())
    looked = Lookup(torch.tensor([[3, 3, 3]]), torch.tensor([[[1e6], [-1e6], [1.0]]]), 5)
    assert float(looked.norms()) ** 2 >= float(looked.rows().double().square().sum())


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_mixes_examples_is_refused(mode: str) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 3)

        def forward(self, values: Tensor) -> Tensor:
            hidden: Tensor = self.dense(values)
            return hidden - hidden.mean(dim=0) / 2

    module, losses = built(Centred)
    check: Any = partial(check_mode, MODES[mode](module, losses), module, losses, batch_of(drawn(6, 5)))
    if mode == "vmap":
        check()  # each example is alone there
    else:
        with pytest.raises(UnsuitedError, match="the model or the loss mixes examples"):
            check()


def test_a_layer_whose_rows_are_not_examples_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 3)

        def forward(self, values: Tensor) -> Tensor:
            hidden: Tensor = self.dense(values.flatten(0, 1)).view(len(values), 2, 3).sum(dim=1)
            return hidden

    module, losses = built(Flat)
    with pytest.raises(UnsuitedError, match="takes 8 rows for 4 examples"):
        taken(Bookkeeping(module, losses), batch_of(drawn(4, 2, 5)), Clip(1.0))


def chosen(model: Callable[[], nn.Module], inputs: Tensor, name: str = "auto", *, apart: bool = False) -> GradientMode:
    module, losses = built(model)
    return choose_mode(name, module, losses, batch_of(inputs), Clip(1.0, apart), fingerprint="f")


def test_bookkeeping_is_chosen_for_layers_that_it_knows() -> None:
    assert isinstance(chosen(dense, drawn(6, 5)), Bookkeeping)
    assert isinstance(chosen(Images, drawn(6, 3, 12, 12)), Bookkeeping)


class Scaled(nn.Module):
    """A parameter of the model's own, which no list of layers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.last(values * self.scale)
        return hidden


def test_another_mode_is_measured_and_remembered_for_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    first = chosen(Scaled, drawn(6, 5))
    assert not isinstance(first, Bookkeeping)
    monkeypatch.setattr("clients.gradient_choice._fastest", None)  # measuring again would fail
    assert type(chosen(Scaled, drawn(6, 5))) is type(first)


def test_a_mode_that_is_named_and_cannot_is_refused_with_the_reason() -> None:
    with pytest.raises(TaskError, match=r"gradients 'bookkeeping' cannot be used: layer of the model \(Scaled\)"):
        chosen(Scaled, drawn(6, 5), "bookkeeping")
    with pytest.raises(TaskError, match="ghost clipping cuts whole gradients only"):
        chosen(dense, drawn(6, 5), "ghost", apart=True)


def test_a_scalar_loss_is_refused() -> None:
    module, _ = built(dense)
    from clients.per_example import losses_of

    losses = losses_of(lambda batch: (module(*batch[0]).mean(), None))
    with pytest.raises(TaskError, match="one loss an example"):
        losses(batch_of(drawn(3, 5)))


def padded() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 6, padding_idx=0), nn.Flatten(), nn.Linear(42, 3))


def test_the_check_finds_opacus_training_the_padding_of_an_embedding() -> None:
    tokens = MODELS["words"][1] % 3
    module, losses = built(padded)
    check_mode(Bookkeeping(module, losses), module, losses, batch_of(tokens))
    with pytest.raises(UnsuitedError, match="OpacusHooks does not give"):
        check_mode(OpacusHooks(module, losses), module, losses, batch_of(tokens))
