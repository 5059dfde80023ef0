from __future__ import annotations

import re

import pytest
import torch

from fedml_core.control_variates import ControlVariates
from fedml_core.errors import ConfigError, ReplyError, StrategyError
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws, State
from fedml_core.update import Total, Update

SPEC = ModelSpec.of(torch.nn.BatchNorm1d(1))  # weight, bias; then the running mean and variance
DRAWS = Draws.of(0)


def trained(*values: float, step_size: float = 0.5) -> Update:
    update = Update.of(torch.tensor(values), 1.0)
    return update.replace(facts={"step_size": torch.tensor(step_size, dtype=torch.float64)})


def test_everything_starts_at_zero_over_the_trainable_parameters() -> None:
    transform = ControlVariates(population=4)
    assert transform.init(SPEC)["c"].tolist() == [0.0, 0.0]
    assert transform.memory(SPEC)["c_i"].tolist() == [0.0, 0.0]
    assert transform.told({"c": torch.ones(2)})["c"].tolist() == [1.0, 1.0]
    assert transform.encoded_size(4) == 8


def test_the_guide_adds_c_minus_c_i_to_each_gradient() -> None:
    guide = ControlVariates(population=4).guide({"c": torch.tensor([3.0, 1.0])}, {"c_i": torch.tensor([1.0, 2.0])})
    assert guide.mu == 0
    assert guide.offset is not None
    assert guide.offset.tolist() == [2.0, -1.0]


def test_encode_appends_the_change_of_c_i_by_option_two_and_zeros_for_buffers() -> None:
    told, memory = {"c": torch.tensor([1.0, 0.0])}, {"c_i": torch.tensor([5.0, 7.0])}
    encoded, after = ControlVariates(population=4).encode(trained(-2.0, 1.0, 10.0, 20.0), told, memory, DRAWS)
    # c_i+ = c_i - c + (x - y) / 0.5 = [5 - 1 + 4, 7 - 0 - 2]; its change is what is sent.
    assert encoded.values.tolist() == [-2.0, 1.0, 10.0, 20.0, 3.0, -2.0, 0.0, 0.0]
    assert after["c_i"].tolist() == [8.0, 5.0]
    assert memory["c_i"].tolist() == [5.0, 7.0]


def test_decode_splits_the_mean_and_moves_c_by_the_share_that_took_part() -> None:
    total = Total(torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, -8.0, 0.0, 0.0]), 1.0, count=2)
    before = {"c": torch.tensor([1.0, 1.0])}
    step, after = ControlVariates(population=8).decode(total, before, DRAWS)
    assert step.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert after["c"].tolist() == [3.0, -1.0]
    assert before["c"].tolist() == [1.0, 1.0]


def test_c_stays_the_mean_of_all_c_i_when_parts_of_the_population_take_part() -> None:
    transform = ControlVariates(population=5)
    clients: dict[int, State] = {i: transform.memory(SPEC) for i in range(5)}
    state = transform.init(SPEC)
    for cohort in ([0, 1], [1, 2, 3], [4], [0, 1, 2, 3, 4], [2]):
        values = torch.zeros(8)
        for client in cohort:
            update = trained(0.5 + client, -1.0 / (1 + client), 0.0, 0.0, step_size=0.3)
            encoded, clients[client] = transform.encode(update, state, clients[client], DRAWS)
            values += encoded.values
        _, state = transform.decode(Total(values / len(cohort), 1.0, len(cohort)), state, DRAWS)
        mean = torch.stack([kept["c_i"] for kept in clients.values()]).mean(dim=0)
        torch.testing.assert_close(state["c"], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "update",
    [
        trained(1.0, 2.0, 3.0, 4.0, step_size=0.0),
        trained(float("nan"), 2.0, 3.0, 4.0),
        trained(float("inf"), 2.0, 3.0, 4.0),
        trained(1.0, 2.0, 3.0, 4.0, step_size=float("nan")),
        trained(1.0, 2.0, 3.0, 4.0, step_size=-1.0),
    ],
    ids=["no step", "NaN", "infinity", "NaN rate", "negative rate"],
)
def test_a_client_that_took_no_step_or_diverged_keeps_its_c_i_and_sends_its_update_as_it_is(update: Update) -> None:
    told, memory = {"c": torch.tensor([1.0, 1.0])}, {"c_i": torch.tensor([5.0, 7.0])}
    encoded, after = ControlVariates(population=4).encode(update, told, memory, DRAWS)
    assert after["c_i"].tolist() == [5.0, 7.0]
    assert encoded.values[4:].tolist() == [0.0] * 4
    torch.testing.assert_close(encoded.values[:4], update.values, rtol=0, atol=0, equal_nan=True)


def test_one_client_of_a_batch_that_diverged_does_not_spoil_the_others() -> None:
    batch = Update(
        torch.tensor([[1.0, 1.0, 0.0, 0.0], [torch.nan, 1.0, 0.0, 0.0]]),
        torch.ones(2, dtype=torch.float64),
        facts={"step_size": torch.tensor([0.5, 0.5], dtype=torch.float64)},
    )
    memory = {"c_i": torch.ones(2, 2)}
    _, after = ControlVariates(population=4).encode(batch, {"c": torch.zeros(2)}, memory, DRAWS)
    assert after["c_i"].tolist() == [[-1.0, -1.0], [1.0, 1.0]]


def test_a_trainer_that_reports_no_step_size_is_told_what_is_missing() -> None:
    update = Update.of(torch.zeros(4), 1.0)
    with pytest.raises(ReplyError, match="local training reports nothing, and control variates need 'step_size'"):
        ControlVariates(population=1).encode(update, {"c": torch.zeros(2)}, {"c_i": torch.zeros(2)}, DRAWS)


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    message = "a cohort of 3 exceeds the population of 2; population must count every client"
    with pytest.raises(StrategyError, match=message):
        ControlVariates(population=2).decode(Total(torch.zeros(8), 1.0, 3), {"c": torch.zeros(2)}, DRAWS)


@pytest.mark.parametrize(("population", "said"), [(0, ">= 1, got 0"), (2.0, "a whole number, got 2.0")])
def test_a_population_that_is_no_count_is_refused(population: int, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"population must be {said}")):
        ControlVariates(population)
