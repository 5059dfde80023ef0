"""Gradient inversion: exact without protection, nothing under secure aggregation and under noise (A10)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from clients.torch_trainer import TorchTrainer
from fedml_core.model import ModelSpec
from fedml_core.training import Training
from simulations.audit.disclosure import Case, check_disclosure
from simulations.audit.findings import Finding, Verdict
from simulations.audit.inversion import Attack, first_dense, from_agreeing_rows, from_optimisation, label_of, psnr
from strategies import CentralDP, FedAvg, LocalDP
from strategies.secure import SecAggPlus, SecureAggregation
from strategies.strategy import Strategy
from tests.simulations.audit.audit_cases import CLASSES, PIXELS, examples, federation, model, plain, task

ONE = Training(epochs=1, batch_size=5, learning_rate=0.1)


def disclosed(strategy: Strategy, epsilon: float | None = None) -> tuple[Finding, Mapping[tuple[str, str], Case]]:
    simulation = federation(strategy)
    finding, cases = check_disclosure(
        task, strategy, TorchTrainer(task, 0), simulation.population, ONE, epsilon=epsilon, seed=2, steps=30
    )
    return finding, {(case.batch, case.view.by.split(": ")[1]): case for case in cases}


def secure(draw_masks: bool = True) -> SecureAggregation:
    return SecureAggregation(
        plain(), protocol=SecAggPlus(minimum=3, corrupt_share=0.0, dropout_share=0.0), draw_masks=draw_masks
    )


def test_an_unprotected_update_of_one_example_gives_it_back() -> None:
    finding, cases = disclosed(FedAvg())
    case = cases["one example", "one client's update"]
    exact = next(attack for attack in case.attacks if attack.name == "largest row")
    assert exact.relative_error < 1e-5
    assert exact.psnr_db > 80
    assert case.label_found is True
    assert finding.verdict is Verdict.PASS
    assert "nothing was claimed to hide it" in finding.said


def test_a_unit_that_one_example_alone_activates_gives_it_back_from_a_batch() -> None:
    # 256 units and four examples: about 16 units are active for each of them alone.
    layer = nn.Linear(PIXELS, 256)
    inputs = examples(4).inputs[0].flatten(1)
    outputs = nn.Linear(256, CLASSES)(torch.relu(layer(inputs)))
    nn.functional.cross_entropy(outputs, examples(4).targets).backward()
    weight, bias = layer.weight.grad, layer.bias.grad
    assert weight is not None and bias is not None
    told = from_agreeing_rows(weight, bias)
    assert all(float((told - row).norm(dim=1).min() / row.norm()) < 1e-4 for row in inputs)


def test_a_masked_vector_gives_nothing_back_and_a_sum_nothing_to_who_inverts_it_as_one_update() -> None:
    finding, cases = disclosed(secure())
    masked = cases["one example", "one client's masked vector"]
    assert masked.best is None or masked.best.psnr_db < 12
    total = cases["one example", "the sum of 3 updates"]
    attacks = {attack.name: attack.psnr_db for attack in total.attacks}
    assert attacks["largest row"] < 12
    assert attacks["optimisation"] < 12
    assert total.label_found is False
    assert total.view.hidden == "sum"
    # Masks hide whose an example is. In a sum of three examples a unit that one alone activates still tells it.
    assert attacks["agreeing rows"] > 80
    assert finding.verdict is Verdict.WARN
    assert "the sum hides whose it is, and not what it tells" in finding.said


def test_masks_that_are_not_drawn_are_found_out() -> None:
    finding, cases = disclosed(secure(draw_masks=False))
    assert finding.verdict is Verdict.FAIL
    assert "although the protection hides it" in finding.said
    assert cases["one example", "one client's masked vector"].came_back


def test_noise_at_the_server_hides_an_example_from_the_world_and_not_from_the_server() -> None:
    private = CentralDP(plain(), clip_norm=0.5, noise_multiplier=0.5, expected_cohort=6.0, delta=1e-5)
    finding, cases = disclosed(private, epsilon=9.0)
    released = cases["one example", "the released step, all others known"]
    assert released.best is not None
    assert released.best.psnr_db < 12
    assert cases["one example", "one client's update"].came_back
    assert finding.verdict is Verdict.PASS


def test_noise_at_the_client_hides_an_example_from_the_server() -> None:
    finding, cases = disclosed(LocalDP(plain(), clip_norm=0.5, epsilon=4.0, delta=1e-5), epsilon=4.0)
    assert finding.verdict is Verdict.PASS
    assert all(case.best is None or case.best.psnr_db < 12 for case in cases.values())


def test_noise_too_small_to_hide_an_example_warns_or_fails_by_its_epsilon() -> None:
    faint = CentralDP(plain(), clip_norm=0.5, noise_multiplier=1e-6, expected_cohort=6.0, delta=1e-5)
    assert disclosed(faint, epsilon=1e9)[0].verdict is Verdict.WARN
    assert disclosed(faint, epsilon=1.0)[0].verdict is Verdict.FAIL


def test_the_search_comes_closer_to_the_input_than_it_began() -> None:
    module = nn.Sequential(nn.Linear(12, 24), nn.Sigmoid(), nn.Linear(24, 4))
    truth, labels = torch.rand(1, 12, generator=torch.Generator().manual_seed(3)), torch.tensor([2])
    loss = torch.nn.functional.cross_entropy(module(truth), labels)
    update = -torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(module.parameters()))])
    found = {
        steps: from_optimisation(module, update, labels, (12,), within=(0.0, 1.0), steps=steps, seed=1)
        for steps in (1, 200)
    }
    first, last = (Attack.best("search", rows, truth, 1.0) for rows in found.values() if rows is not None)
    assert first is not None and last is not None
    assert last.psnr_db > first.psnr_db + 10
    assert from_optimisation(module, torch.zeros_like(update), labels, (12,), within=(0, 1), steps=1, seed=1) is None


def test_what_a_first_layer_is_and_what_it_is_not() -> None:
    dense = model()
    assert first_dense(dense, ModelSpec.of(dense)) == ("1.weight", "1.bias")
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    assert first_dense(convolution, ModelSpec.of(convolution)) is None
    without = nn.Sequential(nn.Linear(3, 2, bias=False))
    assert first_dense(without, ModelSpec.of(without)) is None


def test_labels_ratios_and_candidates_by_hand() -> None:
    assert label_of(torch.tensor([-0.1, 0.3, -0.2])) == 1
    assert psnr(torch.zeros(4), torch.zeros(4), 1.0) == 120.0
    assert Attack.best("none", torch.full((1, 2), torch.nan), torch.zeros(1, 2), 1.0) is None
    rows = torch.tensor([[2.0, 4.0], [1.0, 2.0], [3.0, 1.0]])
    assert from_agreeing_rows(rows, torch.tensor([2.0, 1.0, 1.0])).tolist() == [[1.0, 2.0], [1.0, 2.0]]
    assert len(from_agreeing_rows(rows, torch.tensor([1.0, 0.0, 0.0]))) == 0


def test_data_that_no_attack_is_for_is_told_and_not_judged() -> None:
    assert (PIXELS, CLASSES, len(examples(4))) == (144, 8, 4)
    simulation = federation(plain())
    regression = type(task)(model=task.model, loss=task.loss, train_data=task.train_data)
    finding, cases = check_disclosure(
        regression, plain(), TorchTrainer(task, 0), simulation.population, ONE, epsilon=None, seed=2
    )
    assert finding.verdict is Verdict.INFO
    assert cases == []


@pytest.mark.parametrize("peak", [1.0, 16.0])
def test_psnr_is_relative_to_the_range(peak: float) -> None:
    assert psnr(torch.zeros(9), torch.full((9,), peak / 10), peak) == pytest.approx(20.0)
