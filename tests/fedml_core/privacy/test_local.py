"""Noise at the client: nothing but the noised update leaves it. Its noise is fresh: tolerances are six deviations."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedml_core.errors import ConfigError
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.local import LocalGaussian
from fedml_core.transform import Draws
from fedml_core.update import Update
from fedml_core.weighting import Uniform
from strategies import FedAvg, LocalDP


def test_noise_is_on_every_coordinate_and_other_in_every_update() -> None:
    # "decode(sum(encode(u_i))) is the sum of the clipped updates plus noise of standard deviation
    # noise_multiplier x clip_norm x sqrt(n) on every coordinate, up to 1 %."
    transform = LocalGaussian(0.5, 3.0)
    rows = torch.zeros(4, 1 << 18)
    rows[0, 0] = 100.0
    encoded, _ = transform.encode(Update(rows, torch.ones(4, dtype=torch.float64)), {}, {}, Draws.of(0))
    for row in encoded.values.double():
        assert float(row.std()) == pytest.approx(1.5, rel=0.01)
        assert stats.kstest(row.numpy()[::8] / 1.5, "norm").pvalue > 1e-9
        assert stats.kstest(row.numpy()[::8] / 3.0, "norm").pvalue < 1e-10
    assert float(encoded.values.sum(dim=0).double().std()) == pytest.approx(3.0, rel=0.01)
    assert float(encoded.values[0, 0]) < 20  # 100 was clipped to 0.5
    correlations = torch.corrcoef(encoded.values.double()) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.015


def test_only_the_noised_update_leaves_the_client() -> None:
    # "what leaves the client is its clipped update plus noise from fresh entropy, and no other number about it."
    # "nobody but the client itself; the server and everybody else see the noised update."
    update = Update.of(torch.ones(3), 17.0, examples=17.0, loss=2.5).replace(facts={"steps": torch.tensor(4.0)})
    first, second = (LocalGaussian(1.0, 2.0).encode(update, {}, {}, Draws.of(0))[0].outgoing() for _ in range(2))
    assert (first.weight.item(), dict(first.sums), dict(first.facts)) == (1.0, {}, {})
    assert not set(first.values.tolist()) & set(second.values.tolist())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_update_that_is_not_finite_stays_visibly_so(wrong: float) -> None:
    # "an update that is not finite becomes NaN as a whole, which no sum accepts."
    rows = torch.tensor([[wrong, 1.0], [1.0, 1.0]])
    encoded, _ = LocalGaussian(1.0, 2.0).encode(Update(rows, torch.ones(2, dtype=torch.float64)), {}, {}, Draws.of(0))
    assert encoded.values[0].isnan().all() and encoded.values[1].isfinite().all()


@pytest.mark.parametrize("epsilon", [0.5, 8.0, 10.0, 20.0, 50.0])
def test_the_epsilon_that_was_asked_for_is_the_one_that_is_kept(epsilon: float) -> None:
    # The textbook formula gives 25.4, 68.5 and 300 where 10, 20 and 50 were asked for.
    strategy = LocalDP(FedAvg(weighting=Uniform()), 0.3, epsilon, 1e-5)
    terms, event = strategy.privacy(), strategy.pipeline().event()
    assert event == {
        "name": "composed",
        "events": [{"name": "analytic-gaussian-local", "noise_multiplier": strategy.noise_multiplier}],
    }
    claim = epsilon_of([event], delta=terms.delta, unit=terms.unit, adjacency="replace-one")
    assert claim.epsilon == pytest.approx(epsilon, rel=1e-6)
    # Independently: two updates are 2 clip norms apart, the noise has noise_multiplier clip norms.
    r = strategy.noise_multiplier / 2
    below, above = 0.5 / r - r * epsilon, -0.5 / r - r * epsilon
    assert stats.norm.cdf(below) - math.exp(epsilon) * stats.norm.cdf(above) == pytest.approx(1e-5, rel=1e-3)


def test_an_update_of_no_clients_is_one_of_no_clients() -> None:
    empty = Update(torch.zeros(0, 3), torch.ones(0, dtype=torch.float64))
    assert LocalGaussian(1.0, 1.0).encode(empty, {}, {}, Draws.of(0))[0].values.shape == (0, 3)


@pytest.mark.parametrize("numbers", [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_impossible_numbers_are_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        LocalGaussian(*numbers)
