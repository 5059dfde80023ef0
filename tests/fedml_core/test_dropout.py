"""Dropout drops what its key says, as often as it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedml_core.dropout import KeyedDropout, purpose_and_stream, torch_words
from fedml_core.errors import TaskError
from fedml_core.randomness import keyed_words

PURPOSE = (1, "client", 2)
STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def dropped(layer: nn.Module, values: Tensor, *, step: int = 0, stream: int = 5) -> Tensor:
    module = nn.Sequential(layer)
    dropout = KeyedDropout(module)
    with dropout.drawing(PURPOSE):
        dropout.at(step, stream)
        return module(values)  # type: ignore[no-any-return]


def by_hand(count: int, probability: float, *, step: int = 0, stream: int = 5) -> Tensor:
    """Return what is kept, from the words by NumPy: four 16-bit signed numbers each."""
    words = keyed_words((*PURPOSE, "dropout", "0", step, 0), [stream], -(-count // 4))[0]
    return torch.from_numpy(words.view(np.int16)[:count].astype(np.int64) < round((1 - probability) * 65536) - 32768)


def test_torch_draws_the_words_that_numpy_draws() -> None:
    steps = torch.arange(1, 8) * STEP
    streams = [0, 1, 77, 2**40]
    expected = keyed_words(PURPOSE, streams, 7).view(np.int64)
    made = [torch_words(PURPOSE, stream, steps).numpy() for stream in streams]
    assert np.array_equal(np.stack(made), expected)
    together = torch.vmap(lambda stream: torch_words(PURPOSE, stream, steps))(torch.tensor(streams))
    assert np.array_equal(together.numpy(), expected)


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_what_the_words_say_and_scales_it(probability: float) -> None:
    made = dropped(nn.Dropout(probability), torch.ones(7, 9))
    kept = by_hand(63, probability).view(7, 9)
    scale = 65536 / round((1 - probability) * 65536)
    assert torch.equal(made != 0, kept)
    assert torch.allclose(made[kept], torch.tensor(scale))


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.85])
def test_units_are_kept_as_often_as_they_should_be(probability: float) -> None:
    count = 1 << 20
    kept = (dropped(nn.Dropout(probability), torch.ones(1 << 10, 1 << 10)) != 0).double().mean().item()
    # Five standard deviations of a fair draw.
    assert abs(kept - (1 - probability)) < 5 * (probability * (1 - probability) / count) ** 0.5
    assert abs(round((1 - probability) * 65536) / 65536 - (1 - probability)) < 2e-5


def test_the_first_examples_drop_the_same_in_a_larger_batch() -> None:
    values = torch.ones(10, 7)
    assert torch.equal(dropped(nn.Dropout(0.5), values)[:3], dropped(nn.Dropout(0.5), values[:3]))


def test_every_step_stream_and_layer_draws_its_own() -> None:
    values = torch.ones(8, 32)
    first = dropped(nn.Dropout(0.5), values)
    others = [dropped(nn.Dropout(0.5), values, step=1), dropped(nn.Dropout(0.5), values, stream=6)]
    module = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    dropout = KeyedDropout(module)
    with dropout.drawing(PURPOSE):
        dropout.at(0, 5)
        others.append(module(values))
    for other in others:
        # Independent masks agree on half of 256 places, give or take 8.
        assert 88 < int((first == other).sum()) < 168
    assert torch.equal(first, dropped(nn.Dropout(0.5), values))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Dropout1d(0.5), (6, 8, 5)), (nn.Dropout2d(0.5), (6, 8, 3, 2)), (nn.Dropout3d(0.5), (6, 8, 2, 2, 2))],
)
def test_channels_are_dropped_whole(layer: nn.Module, shape: tuple[int, ...]) -> None:
    made = dropped(layer, torch.ones(shape)).flatten(2)
    assert torch.equal(made != 0, by_hand(48, 0.5).view(6, 8, 1).expand(made.shape))
    assert torch.all((made == 0) | (made == 2))


@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_keeps_mean_and_variance(kind: type[nn.AlphaDropout]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1 << 9, 1 << 9, generator=generator)
    made = dropped(kind(0.3), values)
    # Dropped units saturate SELU; the affine map gives back mean 0 and variance 1, to the noise of 2^18 draws.
    assert abs(made.mean().item()) < 0.02
    assert abs(made.var().item() - 1) < 0.02
    assert len(made[~by_hand(1 << 18, 0.3).view(made.shape)].unique()) == 1


def test_in_place_and_out_of_place_agree() -> None:
    values = torch.randn(4, 6)
    for kind in (nn.Dropout, nn.AlphaDropout):
        changed = values.clone()
        made = dropped(kind(0.4, inplace=True), changed)
        assert made.data_ptr() == changed.data_ptr()
        assert torch.allclose(made, dropped(kind(0.4), values))


def test_gradients_pass_where_values_do() -> None:
    values = torch.ones(5, 5, requires_grad=True)
    made = dropped(nn.Dropout(0.5), values)
    (gradient,) = torch.autograd.grad(made.sum(), values)
    assert torch.equal(gradient, made.detach())


@pytest.mark.parametrize(("probability", "value"), [(0.0, 1.0), (1e-7, 1.0), (1.0, 0.0)])
def test_the_ends_of_probability_are_exact(probability: float, value: float) -> None:
    for kind in (nn.Dropout, nn.AlphaDropout):
        assert torch.equal(dropped(kind(probability), torch.ones(3, 3)), torch.full((3, 3), value))


def test_in_evaluation_and_outside_nothing_is_replaced() -> None:
    layer = nn.Dropout(0.5)
    assert torch.equal(dropped(layer.eval(), torch.ones(4)), torch.ones(4))
    assert "forward" not in vars(layer)
    assert not nn.Sequential(layer)._forward_hooks


def test_layers_with_their_own_forward_are_left_alone() -> None:
    class Own(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1

    assert torch.equal(dropped(Own(0.5), torch.zeros(2)), torch.ones(2))


def test_inputs_without_a_batch_are_left_to_torch() -> None:
    made = dropped(nn.Dropout1d(0.5), torch.ones(64, 3))
    assert set(made.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(made[:, 0] != 0, by_hand(64, 0.5))


class Checkpointed(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.drop, self.times = nn.Dropout(0.5), times

    def forward(self, values: Tensor) -> Tensor:
        for _ in range(self.times):
            values = checkpoint(lambda v: self.drop(v * v), values, use_reentrant=False)
        return values


def test_a_checkpoint_computes_again_what_it_computed_first() -> None:
    values = torch.full((6, 6), 3.0, requires_grad=True)
    module = Checkpointed(1)
    dropout = KeyedDropout(module)
    with dropout.drawing(PURPOSE):
        dropout.at(0, 5)
        made = module(values)
        (gradient,) = torch.autograd.grad(made.sum(), values)
    # The derivative of 2 v^2 is 12 where the mask kept it, and made is 18 there.
    assert torch.equal(gradient * 1.5, made.detach())


def test_a_checkpointed_layer_in_two_places_is_refused() -> None:
    module = Checkpointed(2)
    dropout = KeyedDropout(module)
    values = torch.ones(6, 6, requires_grad=True)
    with dropout.drawing(PURPOSE), pytest.raises(TaskError, match="dropout layer drop runs 2 times in a forward pass"):
        dropout.at(0, 5)
        module(values).sum().backward()


def test_layouts_drop_the_same_units() -> None:
    values = torch.ones(3, 4, 5, 6)
    other = dropped(nn.Dropout(0.5), values.contiguous(memory_format=torch.channels_last))
    assert torch.equal(dropped(nn.Dropout(0.5), values), other)
    assert other.is_contiguous(memory_format=torch.channels_last)


def test_a_key_without_a_number_is_one_stream() -> None:
    assert purpose_and_stream((1, "client", 7)) == ((1, "client"), 7)
    assert purpose_and_stream((1, "central")) == ((1, "central"), 0)
