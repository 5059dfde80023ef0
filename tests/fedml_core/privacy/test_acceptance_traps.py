"""What is wrong in other people's private learning, and would be wrong here if nobody looked: one test for each trap.

Traps with a test beside the code that avoids them are not repeated; these are what was left.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedml_core.model import ModelSpec
from fedml_core.privacy.accounting import epsilon_of
from fedml_core.privacy.adaptive_clip import AdaptiveClip, noise_beside_counter
from fedml_core.privacy.analytic import analytic_gaussian_delta
from fedml_core.privacy.correlated import BandedNoise, ServerBanded, ServerTree, TreeNoise
from fedml_core.privacy.gaussian import ServerGaussian, ServerNoise
from fedml_core.privacy.lattice import Lattice
from fedml_core.privacy.ledger import Account, Ledger, Purpose
from fedml_core.privacy.local import LocalGaussian
from fedml_core.transform import Draws, Transform, chain
from fedml_core.update import Total, Update
from fedml_core.weighting import Uniform
from server.books import charged
from server.sampling import PoissonSampling
from strategies import CentralDP, DistributedDP, FedAvg, LocalDP, Strategy
from tests.fedml_core.privacy.accounting_cases import gaussian, poisson, repeated
from tests.sources import our_files

SIZE = 5000
EVENLY = FedAvg(weighting=Uniform())
NOISES: dict[str, ServerNoise] = {
    "independent": ServerGaussian(1.5, 10.0, bound=0.3),
    "tree": ServerTree(1.5, 10.0, TreeNoise(rounds=9), bound=0.3),
    "banded": ServerBanded(1.5, 10.0, BandedNoise(rounds=9, bands=4), bound=0.3),
}


def released(noise: ServerNoise, rounds: int, value: float) -> list[torch.Tensor]:
    assert isinstance(noise, Transform)
    state, out = noise.init(ModelSpec.of_size(SIZE)), []
    for _ in range(rounds):
        total, state = noise.decode(Total(torch.full((SIZE,), value), 1.0, 1), state, Draws.of(0))
        out.append(total.values)
    return out


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.123456789, 7.7e3])
@pytest.mark.parametrize("name", NOISES)
def test_floats_of_every_noise_are_those_that_any_other_sum_could_have_given(name: str, value: float) -> None:
    # Mironov (2012): noise in floating-point numbers added to a sum leaves holes that tell the sum.
    noise = NOISES[name]
    step = noise.lattice(SIZE).step
    for values in released(noise, 6, value):
        nearest = torch.from_numpy(np.rint(values.double().numpy() / step) * step).float()
        assert torch.equal(values, nearest)
    # A noise that is drawn and added as floats is off that grid nearly everywhere.
    bare = value + torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).double() * noise.lattice(SIZE).sigma
    off = torch.from_numpy(np.rint(bare.numpy() / step) * step)
    assert float((bare != off).double().mean()) > 0.99


def test_floats_of_local_noise_are_those_that_any_other_update_could_have_given() -> None:
    update, half = Update.of(torch.linspace(-0.01, 0.02, SIZE)), LocalGaussian(1.0, 1.5)
    step = Lattice.of(1.5, 1.0, SIZE).step
    values = half.encode(update, {}, {}, Draws.of(0))[0].values
    assert torch.equal(values, torch.from_numpy(np.rint(values.double().numpy() / step) * step).float())


@pytest.mark.parametrize("bands", [1, 4, 64])
def test_rounding_what_is_taken_back_is_paid_for(bands: int) -> None:
    # "what rounding the sum and what is taken back adds to a client's influence is paid for by more noise, of
    # at most 2 %."
    size, multiplier, bound = 1 << 20, 2.0, 0.3
    noise = ServerBanded(multiplier, 10.0, BandedNoise(rounds=64, bands=bands), bound=bound)
    lattice = noise.lattice(size)
    # A step in each coordinate of the round itself, and one in each round from which it is taken back.
    influence = bound + lattice.step * math.sqrt(size) * (1 + math.sqrt(bands))
    assert multiplier * influence <= lattice.sigma <= 1.02 * multiplier * bound


def test_banded_noise_that_rounding_would_outweigh_is_refused() -> None:
    noise = ServerBanded(2000.0, 10.0, BandedNoise(rounds=64, bands=64), bound=1.0)
    with pytest.raises(Exception, match="5000 coordinates with 64 bands are too many for noise_multiplier 2000"):
        noise.lattice(SIZE)


STRATEGIES: dict[str, tuple[Strategy, int]] = {
    "central": (CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5), 0),
    "adaptive": (CentralDP(EVENLY, AdaptiveClip(counter_noise=2.0), 1.0, 10.0, 1e-5), 1),
    "tree": (CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5, TreeNoise(rounds=8)), 0),
    "banded": (CentralDP(EVENLY, 1.0, 1.0, 10.0, 1e-5, BandedNoise(rounds=8, bands=4)), 0),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_seed_that_anybody_could_know_decides_noise_at_the_server(name: str) -> None:
    strategy, more = STRATEGIES[name]
    state, zeros = strategy.init(ModelSpec.of_size(SIZE)), torch.zeros(SIZE)

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        np.random.seed(1)
        return strategy.step(zeros, Total(torch.zeros(SIZE + more), 0.0, 0), state, Draws.of("known", 1))[0]

    one, other = step(), step()
    assert float((one != other).float().mean()) > 0.99
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


def test_no_seed_that_anybody_could_know_decides_noise_at_a_client() -> None:
    half, update = LocalGaussian(1.0, 1.0), Update.of(torch.zeros(SIZE))
    one, other = (half.encode(update, {}, {}, Draws.of("known", 1))[0].values for _ in range(2))
    assert float((one != other).float().mean()) > 0.99


def test_nothing_that_protects_draws_from_a_generator_that_can_be_seeded() -> None:
    # A6 for this half: noise, rounding and sampling by NumPy's, torch's or Python's generators can be foretold.
    seedable = ("np.random", "numpy.random", "torch.rand", "torch.normal", "torch.Generator", "seeded(", ".uniform(")
    places = ("fedml_core/privacy/", "clients/private_", "clients/per_example")
    audits = ("auditing.py", "membership.py", "goodness.py", "cells.py")  # they attack, and must reproduce
    code = {
        file: _code(text)
        for file, text in our_files().items()
        if file.endswith(".py") and file.startswith(places) and not file.endswith(audits)
    }
    assert len(code) > 25
    found = [(file, word) for file, text in code.items() for word in seedable if word in text]
    found += [(file, "import random") for file, text in code.items() if "random" in _imports(text)]
    assert found == []
    assert "np.random" in _code("x = np.random.normal()  # np") and "random" in _imports("import random")


def _code(text: str) -> str:
    return ast.unparse(ast.parse(text))


def _imports(text: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    return {alias.name for node in nodes for alias in node.names}


@pytest.mark.parametrize("epsilon", [10.0, 20.0, 50.0])
def test_local_noise_is_not_that_of_the_textbook_which_fails_above_one(epsilon: float) -> None:
    delta = 1e-5
    textbook = 2 * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    ours = LocalDP(EVENLY, 1.0, epsilon, delta).noise_multiplier
    # Over the distance of two clipped updates, which is twice the clip norm.
    assert analytic_gaussian_delta(epsilon, ours / 2) <= delta < analytic_gaussian_delta(epsilon, textbook / 2)


SEEN: dict[str, Strategy] = {
    "distributed": DistributedDP(EVENLY, 1.0, 1.0, 1e-5, size=66, cohort_size=20, honest=12),
    "local": LocalDP(EVENLY, 1.0, 2.0, 1e-5),
    "tree": STRATEGIES["tree"][0],
    "banded": STRATEGIES["banded"][0],
}


@pytest.mark.parametrize("name", SEEN)
def test_no_sample_amplifies_where_those_who_are_held_off_see_who_was_drawn(name: str) -> None:
    # Whoever sums under masks, or gets updates that are noised, sees who sends them.
    strategy = SEEN[name]
    spent, _ = charged((), strategy, PoissonSampling(0.1), 1000)
    assert spent == [{"name": "repeated", "count": 1, "event": strategy.pipeline().event()}]
    sampled, _ = charged((), STRATEGIES["central"][0], PoissonSampling(0.1), 1000)
    assert sampled[0]["event"]["name"] == "poisson"


def test_a_noise_scaled_by_those_who_came_would_be_seen() -> None:
    # Others scale noise by the clients that were sampled and divide by the replies: fewer replies, less noise each.
    for came in (0, 1, 10):
        total = Total(torch.zeros(100_000), float(came), came)
        noise = ServerGaussian(1.0, 10.0, bound=1.0)
        noised, _ = chain_of(noise).decode(total, {}, Draws.of(0))
        assert float(noised.values.std()) == pytest.approx(1.0, rel=0.015)
        assert noised.weight == 10.0


def chain_of(noise: ServerGaussian) -> ServerGaussian:
    assert noise.placed(_Bounded(), chain()).bound == 1.0
    return noise


class _Bounded(Transform):
    def l2_bound(self, incoming: float) -> float:
        return 1.0


def test_data_of_different_holders_do_not_add_up_and_those_of_one_do(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "all.sqlite")
    event = poisson(0.1, gaussian(1.0))
    for place in range(4):
        for ward in ("ward-a", "ward-b"):
            ledger.reserve(event, Account(ward, "example", "add-or-remove-one"), Purpose("run", "", place, "example"))
    alone = epsilon_of([event] * 4, delta=1e-5, unit="example", adjacency="add-or-remove-one").epsilon
    wards = [ledger.spent(Account(ward, "example", "add-or-remove-one"), 1e-5) for ward in ("ward-a", "ward-b")]
    assert [claim.epsilon for claim in wards] == [alone, alone]
    assert epsilon_of([event] * 8, delta=1e-5, unit="example", adjacency="add-or-remove-one").epsilon > 1.1 * alone
    # Quoted as another unit's, an example's epsilon is no client's: there nothing was released at all.
    assert ledger.spent(Account("ward-a", "client", "add-or-remove-one"), 1e-5).accountant == "none"


def test_a_central_limit_theorem_would_say_less_than_the_truth_and_the_claim_does_not() -> None:
    rate, noise, count, delta = 0.01, 1.0, 1000, 1e-5
    mu = rate * math.sqrt(count * math.expm1(noise**-2))
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if analytic_gaussian_delta(middle, 1 / mu) > delta else (low, middle)
    claim = epsilon_of(
        [repeated(count, poisson(rate, gaussian(noise)))], delta=delta, unit="client", adjacency="add-or-remove-one"
    )
    assert high == pytest.approx(1.6177, abs=2e-3)
    assert claim.epsilon > 1.8282 > high


def test_the_noise_of_a_sum_is_for_the_honest_that_are_sure_to_be_in_it() -> None:
    # Calibrated to all that are asked, 40 % of lost and colluding clients would take 40 % of the variance away.
    asked, honest = 20, 12
    strategy = DistributedDP(EVENLY, 1.0, 1.0, 1e-5, size=66, cohort_size=asked, honest=honest)
    event = strategy.pipeline().event()
    assert event is not None
    (part,) = event["events"]
    assert part["clients"] == honest
    assert part["local_noise"] * math.sqrt(honest) == pytest.approx(1.0)
    assert part["local_noise"] * math.sqrt(asked) == pytest.approx(math.sqrt(asked / honest))


@pytest.mark.parametrize("counter_noise", [1e-300, 1e-9, 0.5])
def test_a_counter_with_next_to_no_noise_is_refused_and_no_overflow(counter_noise: float) -> None:
    with pytest.raises(Exception, match=r"counter_noise must be > 0\.5 for noise_multiplier 1"):
        noise_beside_counter(1.0, counter_noise)
    assert noise_beside_counter(1e-200, 1.0) == pytest.approx(1e-200)
