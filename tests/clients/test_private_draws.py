"""Traps of DP-SGD: what a model draws or remembers, who is in a batch, and noise that is drawn ahead."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.gradient_modes import Bookkeeping
from clients.per_example import Clipped
from clients.private_noise import GradientNoise, poisson_rows
from fedml_core.errors import TaskError
from fedml_core.privacy.entropy import NoiseStream
from fedml_core.training import Training
from tests.clients.private_cases import private_of, trained, trainer_of
from tests.clients.trainer_cases import classification, drawn, labelled
from tests.fedml_core.privacy.given_words import Given

SILENT = {"noise_multiplier": 1e-6, "sampling_rate": 1.0}
ONE_STEP = Training(steps=1, batch_size=1, learning_rate=1.0)


class Drawing(nn.Module):
    """Drops out by layer and by function, and draws numbers of its own; keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(5, 3), nn.Dropout(0.5)
        self.seen: list[list[float]] = []

    def forward(self, values: Tensor) -> Tensor:
        ones = torch.ones(40)
        if self.training:
            drops = self.dropout(ones), nn.functional.dropout(ones, 0.5, self.training), torch.rand(3)
            self.seen.append(torch.cat(drops).tolist())
        hidden: Tensor = self.dense(values)
        return hidden


def test_what_the_model_draws_follows_no_key_that_a_server_knows() -> None:
    # Masks go by place in the batch: one example more moves the others to other masks, and whoever knew the masks could
    # see it in all of their gradients.
    made: list[Drawing] = []

    def model() -> nn.Module:
        made.append(Drawing())
        return made[-1]

    trainer = trainer_of(classification(model), private_of(**SILENT))
    draws = []
    for _ in range(2):
        made[-1].seen.clear()
        trained(trainer, labelled(), ONE_STEP)
        draws.append(made[-1].seen[-1])
    by_layer, by_function, own = slice(0, 40), slice(40, 80), slice(80, 83)
    for part in (by_layer, by_function, own):
        assert draws[0][part] != draws[1][part]


class Remembering(nn.Module):
    """Centres by what it saw before, in a buffer that does not travel."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(5), persistent=False)
        self.cache = None

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.dense(values)
        if self.training and len(values) > 3:
            self.seen = values.detach().mean(dim=0)
        return hidden


def test_a_buffer_that_stays_may_not_carry_examples_to_later_steps() -> None:
    with pytest.raises(TaskError, match="training changed seen, a buffer that would leave without noise"):
        trained(trainer_of(classification(Remembering), private_of(sampling_rate=1.0)), labelled())


def test_a_cache_that_grows_with_what_is_asked_is_no_memory() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 3)
            self.register_buffer("places", torch.zeros(0), persistent=False)
            self.places: Tensor

        def forward(self, values: Tensor) -> Tensor:
            if not len(self.places):
                self.places = torch.arange(5.0)
            hidden: Tensor = self.dense(values + self.places)
            return hidden

    assert trained(trainer_of(classification(Growing)), labelled()).values.any()


def test_an_example_is_in_a_batch_where_64_bits_are_below_the_rate() -> None:
    high, low = 0x1234, 0x00F0_0000_0100
    rate = (high * 2**48 + low) / 2**64
    assert int(rate * 2**64) == (high << 48) + low
    below, equal, above = high - 1, high, high + 1
    first = below | equal << 16 | above << 32 | equal << 48
    second = equal | above << 16
    # Five examples; those at 1, 3 and 4 need 48 more bits: just below, at and above the rate's.
    more = [(low - 1) << 16 | 0xFFFF, low << 16, (low + 1) << 16]
    assert poisson_rows(Given([first, second, *more]), 5, rate).tolist() == [0, 1]


def no_thread() -> bool:
    return not any(thread.name.startswith("noise") for thread in threading.enumerate())


def test_noise_that_is_drawn_ahead_is_that_of_the_stream_once_each() -> None:
    noise, ahead = GradientNoise(1.0, 500), GradientNoise(1.0, 500)
    for made in (noise, ahead):
        made._stream = NoiseStream(b"a" * 32)
    zeros = torch.zeros(500)
    inline = [noise.added(zeros, norm) for norm in (1.0, 0.5, 2.0)]
    with ahead.ahead(3):
        found = [ahead.added(zeros, norm) for norm in (1.0, 0.5, 2.0)]
    assert all(torch.equal(one, other) for one, other in zip(inline, found, strict=True))
    assert torch.equal(noise.added(zeros, 1.0), ahead.added(zeros, 1.0))  # none was drawn in vain
    assert no_thread()


def test_a_training_that_fails_leaves_no_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Clipped:
        raise TaskError("the third batch fails")

    trainer = trainer_of(private=private_of(sampling_rate=1.0))
    trained(trainer, labelled())
    monkeypatch.setattr(Bookkeeping, "clipped", fail)
    with pytest.raises(TaskError, match="the third batch fails"):
        trained(trainer, labelled())
    assert no_thread()


@pytest.mark.parametrize("size", [3, 4000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6, 1e9])
def test_sums_of_any_size_are_rounded_to_the_same_grid_by_both_ways(size: int, scale: float) -> None:
    total = drawn(size) * scale
    one, other = GradientNoise(1e-3, size), GradientNoise(1e-3, size)
    one._stream, other._stream = NoiseStream(b"r" * 32), NoiseStream(b"r" * 32)
    lattice = one.grid(1.0)
    expected = lattice.values(lattice.whole(total) + lattice.noise(other._stream, size), total)
    assert torch.equal(one.added(total, 1.0), expected)
