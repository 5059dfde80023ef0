"""A guide is a term of the loss, clipping comes after it, and both see true gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedml_core.errors import StrategyError
from fedml_core.training import Training
from fedml_core.transform import Guide
from tests.clients.trainer_cases import (
    batches_of,
    by_hand,
    classification,
    drawn,
    flat,
    labelled,
    trained,
    trainer_of,
)

SGD = partial(torch.optim.SGD, lr=0.1)


def joined(module: nn.Module) -> Tensor:
    return torch.cat([parameter.reshape(-1) for parameter in module.parameters()])


def test_a_proximal_guide_is_the_gradient_of_its_loss() -> None:
    task, data, mu = classification(), labelled(), 0.7
    update = trained(trainer_of(task), data, Training(epochs=3, batch_size=4), guide=Guide(mu))
    module, start = task.build(0), flat(task.build(0))
    rows = batches_of(data, 4, epochs=3)
    by_hand(module, data, rows, SGD, lambda m: mu / 2 * (joined(m) - start).square().sum())
    assert torch.allclose(update.values, flat(module) - start, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(update.values, trained(trainer_of(task), data, Training(epochs=3, batch_size=4)).values)


def test_an_offset_guide_is_the_gradient_of_a_linear_loss() -> None:
    task, data, offset = classification(), labelled(), drawn(75, seed=6)
    update = trained(trainer_of(task), data, guide=Guide(offset=offset))
    module, start = task.build(0), flat(task.build(0))
    by_hand(module, data, batches_of(data, 4), SGD, lambda m: (joined(m) * offset).sum())
    assert torch.allclose(update.values, flat(module) - start, rtol=1e-5, atol=1e-6)


def test_guides_add_up() -> None:
    task, data = classification(), labelled()
    guide = Guide(0.3, drawn(75, seed=6)) + Guide(0.4, drawn(75, seed=7))
    update = trained(trainer_of(task), data, guide=guide)
    module, start = task.build(0), flat(task.build(0))

    def extra(m: nn.Module) -> Tensor:
        moved = joined(m) - start
        return 0.35 * moved.square().sum() + (moved * (drawn(75, seed=6) + drawn(75, seed=7))).sum()

    by_hand(module, data, batches_of(data, 4), SGD, extra)
    assert torch.allclose(update.values, flat(module) - start, rtol=1e-5, atol=1e-6)


def test_a_guide_reaches_parameters_that_the_loss_does_not() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(5, 3), nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    trainer = trainer_of(classification(Spare))
    offset = torch.zeros(20)
    where = trainer.spec.views(offset)["spare"]
    where.fill_(1.0)
    training = Training(steps=1, batch_size=8)
    guided = trainer.spec.views(trained(trainer, labelled(8), training, guide=Guide(offset=offset)).values)
    plain = trainer.spec.views(trained(trainer, labelled(8), training).values)
    assert torch.allclose(guided["spare"], torch.full((2,), -0.1))
    assert torch.equal(plain["spare"], torch.zeros(2))
    assert torch.equal(guided["used.weight"], plain["used.weight"])


def test_a_guide_covers_parameters_and_leaves_buffers_alone() -> None:
    task = classification(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    trainer = trainer_of(task)
    assert (trainer.spec.parameter_count, trainer.spec.size) == (28, 38)
    training = Training(steps=1, batch_size=8)
    guided = trained(trainer, labelled(8), training, guide=Guide(offset=torch.ones(28)))
    plain = trained(trainer, labelled(8), training)
    assert torch.allclose(guided.values[:28], plain.values[:28] - 0.1, atol=1e-6)
    assert torch.equal(guided.values[28:], plain.values[28:])


def test_a_guide_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(StrategyError, match=r"a guide's offset must have shape \(75,\), got \(74,\)"):
        trained(trainer_of(classification()), labelled(), guide=Guide(offset=torch.ones(74)))


def test_clipping_bounds_the_step_and_keeps_its_direction() -> None:
    trainer = trainer_of(classification())
    one = Training(steps=1, batch_size=64, learning_rate=0.5)
    plain = trained(trainer, labelled(), one).values
    clipped = trained(trainer, labelled(), one.model_copy(update={"max_gradient_norm": 0.01})).values
    loose = trained(trainer, labelled(), one.model_copy(update={"max_gradient_norm": 100.0})).values
    assert clipped.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert torch.cosine_similarity(plain, clipped, dim=0).item() == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(loose, plain, atol=1e-8)


def test_clipping_comes_after_the_guide() -> None:
    guide = Guide(offset=1000 * torch.ones(75))
    training = Training(steps=1, batch_size=64, learning_rate=0.5, max_gradient_norm=0.01)
    update = trained(trainer_of(classification()), labelled(), training, guide=guide)
    assert update.values.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_clipping_equals_torchs_own() -> None:
    task, data = classification(), labelled()
    update = trained(trainer_of(task), data, Training(batch_size=4, max_gradient_norm=0.3))
    module, start = task.build(0), flat(task.build(0))
    optimizer = SGD(module.parameters())
    for rows in batches_of(data, 4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data.inputs[0][rows]), data.targets[rows]).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.3)
        optimizer.step()
    assert torch.equal(update.values, flat(module) - start)
