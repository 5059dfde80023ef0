"""Private training: what is reserved, what is noised, what leaves, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.per_example import AdaptiveClipping, FlatClipping, PerLayerClipping
from clients.private_step import padding
from clients.private_trainer import PrivateTorchTrainer
from fedml_core.data import Examples
from fedml_core.errors import FedveilError, PrivacyError, RefusalError, TaskError
from fedml_core.training import Training
from fedml_core.transform import Guide
from tests.clients.private_cases import (
    Event,
    batch_of,
    built,
    dense,
    frozen,
    gradients,
    private_of,
    trained,
    trainer_of,
)
from tests.clients.trainer_cases import classification, drawn, labelled
from tests.clients.trainer_cases import trainer_of as plain_trainer_of
from tests.sources import ROOT

# Hardly any noise, and none to speak of in the batches either.
SILENT = {"noise_multiplier": 1e-6, "sampling_rate": 1.0}
EMPTY = 1e-12


def wide() -> nn.Module:
    return nn.Linear(5, 3 * 4000, bias=True)


def test_reserve_is_called_once_with_the_event_before_any_gradient() -> None:
    # "`reserve` is called with that event once a training, before any gradient; if it raises, nothing is trained, and
    # nothing that fails afterwards takes it back."
    reserved: list[Event] = []
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 3)

        def forward(self, values: Tensor) -> Tensor:
            seen.append(len(reserved))
            hidden: Tensor = self.dense(values)
            return hidden

    trainer = trainer_of(classification(Watched), private_of(noise_multiplier=0.7, sampling_rate=0.25), reserved.append)
    training = Training(epochs=2, batch_size=4)
    trained(trainer, labelled(), training)
    assert reserved == [trainer.event(training)]
    assert seen and set(seen) == {1}
    trained(trainer, labelled(), training)
    assert reserved == [trainer.event(training)] * 2


@pytest.mark.parametrize("error", [PrivacyError("no"), RefusalError("budget", "no budget is left")])
def test_a_refusal_trains_nothing(error: FedveilError) -> None:
    def refuse(event: Event) -> None:
        raise error

    def model() -> nn.Module:
        made = dense()
        made.register_forward_pre_hook(lambda *_: pytest.fail("the model saw an example"))
        return made

    with pytest.raises(type(error), match=str(error)):
        trained(trainer_of(classification(model), reserve=refuse), labelled())


def test_what_fails_afterwards_stays_reserved() -> None:
    reserved: list[Event] = []
    broken = classification(dense, loss=None)
    with pytest.raises(TaskError):
        trained(trainer_of(broken, reserve=reserved.append), labelled())
    assert len(reserved) == 1


def test_the_event_counts_the_steps_that_are_taken() -> None:
    private = private_of(noise_multiplier=0.7, sampling_rate=0.25)
    step = {"name": "gaussian", "noise_multiplier": 0.7}
    sampled = {"name": "poisson", "sampling_probability": 0.25, "event": step}
    for training, count in ((Training(steps=3), 3), (Training(epochs=2), 8)):
        assert private.event(training) == {"name": "repeated", "count": count, "event": sampled}
        assert trained(trainer_of(private=private), labelled(), training).facts["steps"] == count


@pytest.mark.parametrize(("rate", "epochs", "steps"), [(0.3, 1, 3), (0.4, 1, 3), (1.0, 2, 2), (256 / 60000, 1, 234)])
def test_the_number_of_steps_depends_on_public_numbers_only(rate: float, epochs: int, steps: int) -> None:
    assert private_of(sampling_rate=rate).steps(Training(epochs=epochs)) == steps


def test_ten_rounds_of_one_epoch_cost_what_one_run_of_ten_epochs_costs() -> None:
    from fedml_core.privacy.accounting import epsilon_of

    private = private_of(noise_multiplier=1.0, sampling_rate=0.01)
    about: Any = {"delta": 1e-5, "unit": "example", "adjacency": "add-or-remove-one"}
    rounds = epsilon_of([private.event(Training(epochs=1))] * 10, **about)
    run = epsilon_of([private.event(Training(epochs=10))], **about)
    assert rounds.epsilon == run.epsilon
    # Row 5 of the reference values: sampling rate 0.01, noise 1, 1,000 steps.
    assert run.epsilon == pytest.approx(1.8282, rel=0.01)


@pytest.mark.parametrize("clipping", [FlatClipping(2.0), PerLayerClipping(2.0), AdaptiveClipping(2.0, count_noise=3.0)])
def test_an_empty_batch_is_a_step_of_noise_alone_of_the_right_deviation(clipping: Any) -> None:
    private = private_of(noise_multiplier=1.5, clipping=clipping, sampling_rate=EMPTY)
    trainer = trainer_of(classification(wide, loss=_first_three), private)
    update = trained(trainer, labelled(), Training(steps=1, batch_size=5, learning_rate=1.0))
    expected = private.gradient_noise * 2.0 / 5
    # 72,000 draws: the estimate is within 0.26 % in two of three cases, and the grid may add 1 %.
    assert float(update.values.std()) == pytest.approx(expected, rel=0.015)
    assert abs(float(update.values.mean())) < 4 * expected / 72_000**0.5


def _first_three(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs[:, :3], targets, reduction="none")


def test_each_step_and_each_training_has_its_own_noise() -> None:
    trainer = trainer_of(classification(wide, loss=_first_three), private_of(sampling_rate=EMPTY))
    training = Training(steps=4, batch_size=1, learning_rate=1.0)
    first, second = (trained(trainer, labelled(), training).values for _ in range(2))
    # Four steps with the same noise would give 4, and a second training would repeat the first.
    assert float(first.std()) == pytest.approx(2.0, rel=0.015)
    assert abs(float(np.corrcoef(first.numpy(), second.numpy())[0, 1])) < 4 / 72_000**0.5


def clipped_mean(data: Examples, norm: float, batch_size: int) -> Tensor:
    module, losses = built(dense)
    rows = gradients(module, losses, (data.inputs, data.targets, data.weights))
    return torch.stack([row * min(1.0, norm / float(row.norm())) for row in rows if row.any()]).sum(dim=0) / batch_size


@pytest.mark.parametrize("physical", [3, 512])
@pytest.mark.parametrize("count", [1, 17, 23])
def test_a_step_is_the_clipped_sum_over_a_public_denominator(physical: int, count: int) -> None:
    data = labelled(count)
    private = private_of(clipping=FlatClipping(0.5), max_physical_batch=physical, **SILENT)
    update = trained(trainer_of(private=private), data, Training(steps=1, batch_size=7, learning_rate=1.0))
    expected = -clipped_mean(data, 0.5, 7)
    # The rest is the noise, and the 2^-12 that clipping stays inside by.
    assert (update.values - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "hooks", "functorch", "ghost"])
def test_every_mode_trains_alike(mode: str) -> None:
    data, training = labelled(), Training(steps=3, batch_size=23)
    updates = [
        trained(trainer_of(private=private_of(gradients=name, **SILENT)), data, training).values
        for name in (mode, "auto")
    ]
    assert (updates[0] - updates[1]).norm() < 1e-3 * updates[1].norm()


def test_weights_multiply_losses_before_gradients_are_cut() -> None:
    weights = torch.tensor([0.0, 0.5, 3.0, 1.0])
    data = labelled(4, weights=weights)
    private = private_of(clipping=FlatClipping(0.8), **SILENT)
    update = trained(trainer_of(private=private), data, Training(steps=1, batch_size=1, learning_rate=1.0))
    expected = -clipped_mean(data, 0.8, 1)
    assert (update.values - expected).norm() < 1e-3 * expected.norm()


def test_the_guide_is_added_after_the_noise_and_is_not_clipped() -> None:
    private = private_of(noise_multiplier=1e-6, clipping=FlatClipping(1e-3), sampling_rate=EMPTY)
    trainer = trainer_of(private=private)
    offset = drawn(trainer.spec.size, seed=4)
    training = Training(steps=2, batch_size=1, learning_rate=0.1)
    update = trained(trainer, labelled(), training, guide=Guide(mu=0.5, offset=offset))
    # w1 = w0 - 0.1 offset; w2 = w1 - 0.1 (0.5 (w1 - w0) + offset).
    assert torch.allclose(update.values, -0.1 * offset * (2 - 0.05), atol=1e-5)


def test_what_leaves_beside_the_values_is_public() -> None:
    private = private_of(sampling_rate=0.25)
    training = Training(steps=3, batch_size=4, learning_rate=0.2)
    for data in (labelled(23), labelled(5)):
        update = trained(trainer_of(private=private), data, training)
        assert {name: float(value) for name, value in update.sums.items()} == {"examples": 16.0}
        assert float(update.weight) == 1.0
        assert {name: float(value) for name, value in update.facts.items()} == {
            "steps": 3.0,
            "step_size": pytest.approx(0.6),
        }


def test_an_example_that_diverges_neither_ends_the_training_nor_poisons_it() -> None:
    data = labelled()
    data.inputs[0][3] = torch.nan
    data.inputs[0][4] = 3e38
    update = trained(trainer_of(private=private_of(sampling_rate=1.0)), data)
    assert torch.isfinite(update.values).all()


def test_frozen_layers_stay_and_get_no_noise() -> None:
    trainer = trainer_of(classification(frozen))
    assert trainer.spec.size == 8 * 3 + 3
    assert trained(trainer, labelled()).values.shape == (27,)


def test_evaluation_is_that_of_every_trainer() -> None:
    trainer, plain = trainer_of(), plain_trainer_of(classification())
    parameters, data = trainer.initial(), labelled()
    assert trainer.evaluate(parameters, data) == plain.evaluate(parameters, data)


def test_an_optimizer_by_name_or_function_gets_the_noised_gradients() -> None:
    training = Training(steps=3, batch_size=4, optimizer="adam", learning_rate=0.01)
    assert trained(trainer_of(), labelled(), training).values.abs().max() < 0.04  # Adam moves 0.01 a step
    made = trainer_of(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    still = trained(made, labelled())
    assert not still.values.any() and float(still.facts["step_size"]) == 0.0


def test_a_map_style_data_set_is_read_in_batches() -> None:
    data = labelled()

    class Items:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
            return data.inputs[0][place], data.targets[place]

    private = private_of(**SILENT)
    training = Training(steps=1, batch_size=4)
    pair = [trained(trainer_of(private=private), held, training).values for held in (data, Items())]
    assert torch.allclose(pair[0], pair[1], atol=1e-5)


def test_a_buffer_that_remembers_examples_never_leaves() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 3)
            self.register_buffer("seen", torch.zeros(5))

        def forward(self, values: Tensor) -> Tensor:
            if self.training:
                self.seen = values.detach().mean(dim=0)
            hidden: Tensor = self.dense(values)
            return hidden

    with pytest.raises(TaskError, match="training changed seen, a buffer that would leave without noise"):
        trained(trainer_of(classification(Remembering), private_of(sampling_rate=1.0)), labelled())


def test_no_seed_can_choose_the_noise() -> None:
    # The key is the server's to choose, and equal keys give different trainings.
    trainer: PrivateTorchTrainer = trainer_of(seed=3)
    first, second = (trained(trainer, labelled()).values for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("count", range(1, 600, 7))
def test_padding_leaves_few_sizes_and_adds_little(count: int) -> None:
    size = count + padding(count)
    assert size - count <= count / 8 and size % (1 << max(0, count.bit_length() - 4)) == 0


def test_one_example_alone_has_the_gradient_of_its_batch() -> None:
    module, losses = built(dense)
    batch = batch_of(drawn(3, 5))
    total = torch.autograd.grad(losses(batch).sum(), list(module.parameters()))
    found = torch.stack(gradients(module, losses, batch)).sum(dim=0)
    assert torch.allclose(torch.cat([gradient.reshape(-1) for gradient in total]), found, atol=1e-6)


def test_importing_the_trainer_loads_neither_opacus_nor_an_accountant() -> None:
    code = "import sys, clients.private_trainer; print({'opacus', 'scipy', 'dp_accounting'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
