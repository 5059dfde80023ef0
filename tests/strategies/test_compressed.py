from __future__ import annotations

import numpy as np
import pytest
import torch

from fedml_core.compression import StochasticQuantize, TopK
from fedml_core.errors import ConfigError
from fedml_core.model import ModelSpec
from fedml_core.transform import Draws, State
from fedml_core.update import Update
from strategies import Compressed, FedAvg, FedMedian, FedProx, Scaffold, Strategy


def test_error_feedback_delivers_late_what_was_held_back() -> None:
    strategy, spec = Compressed(FedAvg(), TopK(0.25)), ModelSpec.of_size(4)
    half, parameters, state = strategy.client_half(), torch.zeros(4), strategy.init(spec)
    memories: list[State] = [half.memory(spec), half.memory(spec)]
    deltas = [torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.5, 1.0, 2.0])]
    for number in range(200):
        accumulator = strategy.accumulator(spec)
        for client, delta in enumerate(deltas):
            # Each client learns its part in the first round and nothing more.
            update = Update.of(delta if number == 0 else torch.zeros(4), 1.0, examples=1.0 + client)
            encoded, memories[client] = half.encode(update, {}, memories[client], Draws.of(number, client))
            accumulator.add(encoded)
        parameters, state = strategy.step(parameters, accumulator.total(), state, Draws.of(number))
        if number == 0:
            assert parameters.tolist() == pytest.approx([1 / 3, 0, 0, 4 / 3])
    expected = (deltas[0] + 2 * deltas[1]) / 3
    assert parameters.tolist() == pytest.approx(expected.tolist())


def test_the_strategy_inside_still_decides_guides_rules_and_protection() -> None:
    assert Compressed(FedProx(mu=0.5), TopK(0.1)).client_half().guide({}, {}).mu == 0.5
    assert Compressed(FedMedian(), StochasticQuantize(8)).needs_single_updates
    assert not Compressed(FedAvg(), StochasticQuantize(8)).needs_single_updates
    assert Compressed(FedAvg(), TopK(0.1)).protection() == "none"


def test_quantized_fedavg_is_near_the_mean() -> None:
    deltas = [(np.linspace(-1, 1, 50) * scale, 10 * scale) for scale in (1, 2, 3)]
    exact, _ = FedAvg().aggregate(np.zeros(50), deltas)
    near, _ = Compressed(FedAvg(), StochasticQuantize(8)).aggregate(np.zeros(50), deltas, draws=Draws.of(1))
    # Each client's error is below its range times its weight over 127; all three add up to less than 3 / 127.
    assert 0 < np.abs(near - exact).max() < 3 / 127


def test_compression_of_scaffold_leaves_the_control_variates_whole() -> None:
    strategy, spec = Compressed(Scaffold(population=2), TopK(0.5)), ModelSpec.of_size(2)
    half, state = strategy.client_half(), strategy.init(spec)
    update = Update.of(torch.tensor([4.0, 1.0])).replace(facts={"step_size": torch.tensor(1.0)})
    encoded, _ = half.encode(update, strategy.told(state), half.memory(spec), Draws.of(0))
    assert encoded.values.tolist() == [4.0, 0.0, -4.0, -1.0]


def test_a_configuration_can_name_both() -> None:
    table = {"name": "Compressed", "strategy": "FedAvg", "compression": {"name": "TopK", "fraction": 0.1}}
    assert Strategy.from_config(table) == Compressed(FedAvg(), TopK(0.1))
    with pytest.raises(ConfigError, match=r"Compressed.compression: unknown transform 'Top'"):
        Strategy.from_config({**table, "compression": "Top"})
