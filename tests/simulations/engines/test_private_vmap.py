"""DP-SGD of K clients side by side: as one by one but for the noise, which each has; bounded for every example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients import private_noise, private_step
from clients.memory import InProcessMemory
from clients.per_example import AdaptiveClipping, Clipping, FlatClipping, PerLayerClipping
from clients.private_training import PrivateTraining
from fedml_core import Examples, Task, Training
from fedml_core.errors import PrivacyError, TaskError
from fedml_core.randomness import seeded
from fedml_core.transform import Guide
from simulations import Sequential, Simulation, Vectorised, simulate
from simulations.engines import private_streams
from simulations.engines.batch_trainer import BatchWork, UnsupportedError
from simulations.engines.private_rows import BatchTable, ClippedSums, Outer, Piece, Places, Whole
from simulations.engines.private_vmap import PrivateVmapTrainer
from simulations.engines.suited import suitable
from simulations.packing import Packed
from simulations.private_clients import PrivateClients
from strategies import FedProx, Scaffold
from tests.clients.private_cases import MODELS, Twice, dense, frozen
from tests.clients.trainer_cases import classification, drawn, labelled
from tests.simulations.test_private_clients import NOISY
from tests.simulations.test_simulate import TASK

NUMBERS = (4, 7, 19)
PURPOSE = (0, "client", 2)


def private_of(clipping: Clipping | None = None, **changes: Any) -> PrivateTraining:
    given = {"noise_multiplier": 1.0, "clipping": clipping or FlatClipping(0.5), "sampling_rate": 0.4, **changes}
    return PrivateTraining(**given)


def clients_of(private: PrivateTraining, training: Training) -> PrivateClients:
    return PrivateClients.of(private, training)


def work_of(parts: Sequence[Examples], parameters: Tensor, training: Training, guide: Guide | None = None) -> BatchWork:
    return BatchWork(parameters, Packed.of(parts), training, 2, NUMBERS[: len(parts)], PURPOSE, guide or Guide())


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Replace noise by nothing, and samples by the same for client and step; call it before each of two trainings."""
    seen: dict[int, tuple[int, Any]] = {}
    steps: dict[int, Any] = {}

    def sample(stream: Any, count: int, rate: float) -> Tensor:
        # A stream is known by its place among all that were asked; it is kept, so that no other gets its address.
        client, _ = seen.setdefault(id(stream), (len(seen), stream))
        step = next(steps.setdefault(client, itertools.count()))
        taken = seeded(1, "test", client, step).random(count) < rate
        if (client, step) == (1, 0):
            taken[:] = False  # an empty batch beside others
        return torch.from_numpy(np.flatnonzero(taken))

    def begin() -> None:
        seen.clear()
        steps.clear()

    for place in (private_step, private_streams):
        monkeypatch.setattr(place, "poisson_rows", sample)
        monkeypatch.setattr(place, "noised_count", lambda stream, centred, deviation: centred)
    monkeypatch.setattr(
        private_noise.GradientNoise,
        "added",
        lambda self, total, norm, denominator=1: (total / denominator).float(),
    )
    return begin


def compare(
    begin: Callable[[], None],
    task: Task,
    parts: Sequence[Examples],
    private: PrivateTraining,
    training: Training,
    guide: Guide | None = None,
    **rest: Any,
) -> None:
    clients = clients_of(private, training)
    together = PrivateVmapTrainer(task, clients, device="cpu", **rest)
    start = together.initial()
    begin()
    found = together.train(work_of(parts, start, training, guide))
    alone = clients.trainer(task, 0, device="cpu")
    begin()
    for place, part in enumerate(parts):
        own = guide or Guide()
        if own.offset is not None and own.offset.dim() == 2:
            own = Guide(own.mu, own.offset[place])
        key = (*PURPOSE, NUMBERS[place])
        expected = alone.train(start, part, training, round_number=2, key=key, guide=own)
        assert float(expected.values.abs().max()) > 0
        torch.testing.assert_close(found.values[place], expected.values, rtol=1e-5, atol=1e-6)
        assert {name: float(values[place]) for name, values in found.facts.items()} == pytest.approx(
            {name: float(value) for name, value in expected.facts.items()}
        )
        assert {name: float(values[place]) for name, values in found.sums.items()} == {
            name: float(value) for name, value in expected.sums.items()
        }


def parts_of(inputs: Tensor, *, weighted: bool = False) -> list[Examples]:
    targets = torch.randint(0, 3, (len(inputs),), generator=torch.Generator().manual_seed(2))
    weights = torch.rand(len(inputs), generator=torch.Generator().manual_seed(3)) if weighted else None
    places = (range(len(inputs)), range(4), range(2, len(inputs)))
    return [
        Examples.of(inputs[list(at)], targets[list(at)], weights=None if weights is None else weights[list(at)])
        for at in places
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clipping", [FlatClipping(0.5), PerLayerClipping(0.5)], ids=["flat", "per-layer"])
def test_without_noise_each_client_moves_as_it_does_alone(
    name: str, clipping: Clipping, without_noise: Callable[[], None]
) -> None:
    model, inputs = MODELS[name]
    training = Training(steps=4, batch_size=3, learning_rate=0.5)
    compare(without_noise, classification(model), parts_of(inputs), private_of(clipping), training)


@pytest.mark.parametrize(
    "training",
    [
        Training(epochs=2, batch_size=3, learning_rate=0.3, optimizer_arguments={"momentum": 0.9, "nesterov": True}),
        Training(steps=3, batch_size=3, learning_rate=0.05, optimizer="adam"),
        Training(steps=3, batch_size=5, learning_rate=0.2, learning_rate_decay=0.5),
    ],
    ids=["momentum", "adam", "decay"],
)
@pytest.mark.parametrize("rest", [{}, {"gradient_bytes": 1}], ids=["whole", "in parts"])
def test_optimizers_weights_guides_and_parts_change_nothing_of_that(
    training: Training, rest: Any, without_noise: Callable[[], None]
) -> None:
    task, parts = classification(dense), parts_of(drawn(9, 5), weighted=True)
    size = sum(parameter.numel() for parameter in dense().parameters())
    for guide in (Guide(mu=0.3), Guide(offset=drawn(size) / 9), Guide(mu=0.1, offset=drawn(3, size) / 9)):
        compare(without_noise, task, parts, private_of(max_physical_batch=2), training, guide, **rest)


def test_the_norm_of_adaptive_clipping_follows_each_clients_own_gradients(without_noise: Callable[[], None]) -> None:
    parts = [labelled(20, seed=seed) for seed in (1, 5, 9)]
    for place, part in enumerate(parts):
        parts[place] = Examples.of(part.inputs[0] * 4.0**place, part.targets)
    clipping = AdaptiveClipping(1.0, learning_rate=1.0, count_noise=3.0)
    training = Training(steps=6, batch_size=8, learning_rate=0.3)
    compare(without_noise, classification(dense), parts, private_of(clipping), training)


class Behind(nn.Module):
    """A model that uses a layer's weight once more, behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.last(torch.relu(self.dense(values)) @ self.dense.weight)
        return hidden


@pytest.mark.parametrize(
    ("model", "factored"),
    [(dense, True), (frozen, True), (Twice, False), (Behind, False), (MODELS["images"][0], False)],
    ids=["dense", "frozen", "twice", "behind", "images"],
)
def test_gradients_are_left_in_factors_where_dense_layers_are_used_once_and_only_there(
    model: Callable[[], nn.Module], factored: bool, without_noise: Callable[[], None]
) -> None:
    training, private = Training(steps=4, batch_size=3, learning_rate=0.5), private_of()
    inputs = next(inputs for kind, inputs in MODELS.values() if kind is model) if model is not Behind else drawn(9, 5)
    compare(without_noise, classification(model), parts_of(inputs), private, training)
    trainer = PrivateVmapTrainer(classification(model), clients_of(private, training), device="cpu")
    trainer.train(work_of(parts_of(inputs), trainer.initial(), training))
    assert trainer._gradients._factored is factored


def test_gradients_are_left_in_factors_where_some_are_nothing_to_begin_with() -> None:
    def silent() -> nn.Module:
        last = nn.Linear(8, 3)
        nn.init.zeros_(last.weight)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), last)

    training = Training(steps=1, batch_size=4)
    trainer = PrivateVmapTrainer(classification(silent), clients_of(private_of(), training), device="cpu")
    trainer.train(work_of([labelled(12)] * 2, trainer.initial(), training))
    assert trainer._gradients._factored


EXTREMES = [0.0, 1e-30, 1.0, 1e4, 1e18, 1e38, float("inf"), float("nan")]


@pytest.mark.parametrize("clipping", [FlatClipping(0.5), PerLayerClipping(0.5)], ids=["flat", "per-layer"])
@pytest.mark.parametrize("scale", EXTREMES)
def test_an_example_moves_its_own_clients_sum_by_the_norm_at_most_and_no_others(
    scale: float, clipping: Clipping
) -> None:
    # "one example moves its own client's sum by an L2 norm of at most norms[k], whatever it holds, and no other
    # client's. One whose gradient is not finite moves none."
    task, training = classification(dense), Training(steps=1, batch_size=4)
    trainer = PrivateVmapTrainer(task, clients_of(private_of(clipping), training), device="cpu")
    inputs = drawn(3, 6, 5)
    inputs[1, 2] = scale * inputs[1, 2].sign()
    targets = torch.tensor([[0, 1, 2, 0, 1, 2]] * 3)
    if np.isfinite(scale):  # the class that the model believes in the least, so that the gradient is not small
        targets[1, 2] = int(task.build(0)(inputs[1, 2]).argmin())
    packed = Packed.of([Examples.of(*rows) for rows in zip(inputs, targets, strict=True)])
    norms = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64)
    state = [p.detach().expand(3, *p.shape) for p in task.build(0).parameters()]

    def sums(samples: list[list[int]], width: int) -> Tensor:
        rows = BatchTable.of([np.array(sample, dtype=np.int64) for sample in samples], packed.offsets)
        with trainer._model.running(PURPOSE):
            trainer._model.begin()
            found, _ = ClippedSums(trainer._gradients, clipping.clip(1.0), width).of(
                state, packed.examples, rows, norms
            )
        return found.double()

    for width in (8, 2):
        with_it = sums([[0, 1], [0, 1, 2, 3], [4, 5]], width)
        without = sums([[0, 1], [0, 1, 3], [4, 5]], width)
        assert bool(torch.isfinite(with_it).all())
        torch.testing.assert_close(with_it[[0, 2]], without[[0, 2]], rtol=1e-6, atol=1e-7)
        moved = float((with_it[1] - without[1]).norm())
        assert moved <= 0.5 * (1 + 1e-6)
        if not np.isfinite(scale):
            assert moved < 1e-6
        elif 1.0 <= scale < 1e38:
            assert moved > (0.49 if isinstance(clipping, FlatClipping) else 0.25)


def test_places_that_count_for_nothing_add_nothing_even_where_their_example_is_not_finite() -> None:
    def gradients(parameters: Sequence[Tensor], places: Places) -> Sequence[Piece]:
        return [Whole(places.inputs[0] * places.weights[..., None])]

    examples = Examples.of(torch.tensor([[float("nan")], [3.0], [0.25]]), torch.zeros(3, dtype=torch.long))
    rows = BatchTable.of([np.array([], dtype=np.int64), np.array([0, 1], dtype=np.int64)], np.array([0, 1, 3]))
    norms = torch.ones(2, dtype=torch.float64)
    sums, whole = ClippedSums(gradients, FlatClipping(1.0).clip(1.0), 8).of([torch.zeros(2, 1)], examples, rows, norms)
    assert float(sums[0]) == 0.0 and float(sums[1]) == pytest.approx(1.25, abs=1e-3)
    assert whole.tolist() == [0, 1]


def released(steps: int, clipping: Clipping, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return what the noised sums (3, p) of each step are, where no example is in any batch."""
    found: list[Tensor] = []
    plain = private_streams.Streams.noised

    def noised(self: Any, sums: Tensor, denominator: int) -> Tensor:
        assert not bool(sums.any()) and denominator == 5
        found.append(plain(self, sums, denominator))
        return found[-1].clone()

    monkeypatch.setattr(private_streams.Streams, "noised", noised)
    training = Training(steps=steps, batch_size=5, learning_rate=1e-3)
    private = PrivateTraining(noise_multiplier=1.5, clipping=clipping, sampling_rate=1e-12)
    trainer = PrivateVmapTrainer(NOISY, PrivateClients.of(private, training), device="cpu")
    trainer.train(work_of([labelled(12)] * 3, trainer.initial(), training))
    return found


@pytest.mark.parametrize("clipping", [FlatClipping(2.0), AdaptiveClipping(2.0, count_noise=3.0)], ids=["flat", "adapt"])
def test_noise_is_fresh_for_every_client_and_step_and_of_the_configured_deviation(
    clipping: Clipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 2 if isinstance(clipping, FlatClipping) else 1  # the norm moves after a step
    first = released(steps, clipping, monkeypatch)
    monkeypatch.undo()
    second = released(steps, clipping, monkeypatch)
    draws = torch.cat([*first, *second])
    assert draws.shape == (6 * steps, 72_000)
    multiplier = private_of(clipping, noise_multiplier=1.5).gradient_noise
    # Normal draws: a deviation's estimate from 72,000 of them has a relative error of 1/sqrt(2 x 72,000) = 0.26 %,
    # a correlation's 0.37 %. Seven of these leave false alarms to one run in 10^10, tests of all pairs included; the
    # grid adds 0.5 % at most.
    deviation = float(1 / (2 * 72_000) ** 0.5)
    for row in draws:
        assert 1 - 7 * deviation < float(row.std()) / (multiplier * 2.0 / 5) < 1.005 + 7 * deviation
        assert abs(float(row.mean())) < 7 * multiplier * 2.0 / 5 / 72_000**0.5
    for one, other in itertools.combinations(draws, 2):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 7 / 72_000**0.5


def test_dropout_draws_for_each_example_of_each_client_anew_and_by_no_key_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 3))  # noqa: E731 - as tasks name their models
    training = Training(steps=1, batch_size=4)
    trainer = PrivateVmapTrainer(classification(model), clients_of(private_of(), training), device="cpu")
    seen: list[Tensor] = []
    plain = trainer._gradients._products

    def pieces(parameters: Sequence[Tensor], places: Places) -> Sequence[Piece]:
        found = plain(parameters, places)
        weight = found[0]
        assert isinstance(weight, Outer)
        seen.append((weight.across != 0).flatten(0, 1))
        return found

    monkeypatch.setattr(trainer._gradients, "_products", pieces)
    part = Examples.of(torch.ones(8, 64), torch.arange(8) % 3)
    everybody = PrivateTraining(1.0, FlatClipping(1.0), 1.0)
    trainer._clients = clients_of(everybody, training)
    for _ in range(2):
        trainer.train(work_of([part] * 2, trainer.initial(), training))
    masks = torch.cat(seen[1:])  # the first are a trial's
    assert masks.shape == (32, 64) and len(torch.unique(masks, dim=0)) == 32
    assert 0.4 < float(masks.float().mean()) < 0.6


def test_what_was_not_charged_is_not_trained() -> None:
    training = Training(steps=1, batch_size=4)
    trainer = PrivateVmapTrainer(classification(dense), clients_of(private_of(), training), device="cpu")
    with pytest.raises(PrivacyError, match="train as the run's plan says"):
        trainer.train(work_of([labelled(9)], trainer.initial(), Training(steps=2, batch_size=4)))


class Counting(nn.Module):
    """A model that remembers what it saw in a buffer that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(5, 3)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, values: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * values.mean(dim=0)
        hidden: Tensor = self.dense(values)
        return hidden


def test_a_model_that_remembers_examples_is_refused() -> None:
    training = Training(steps=1, batch_size=4)
    trainer = PrivateVmapTrainer(
        classification(Counting), clients_of(private_of(sampling_rate=1.0), training), device="cpu"
    )
    with pytest.raises(UnsupportedError, match="the model changes mean"):
        trainer.train(work_of([labelled(9)], trainer.initial(), training))
    task = classification(Counting, train_data=lambda: labelled(30))
    with pytest.raises(TaskError, match="mean"):
        simulate(
            task,
            Scaffold(population=3),
            clients=3,
            rounds=1,
            engine=Vectorised(),
            private=private_of(sampling_rate=1.0),
        )


class Deciding(nn.Module):
    """A model that torch cannot map: what it computes depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.dense(values)
        return hidden if float(hidden.sum()) > 1e9 else hidden * 1.0


def test_a_model_that_cannot_be_mapped_is_trained_one_by_one_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    task = Task.classification(model=Deciding, classes=3, train_data=TASK.train_data)
    history = simulate(task, FedProx(mu=0.1), clients=3, rounds=1, engine=Vectorised(), private=private_of())
    assert "the vectorised engine cannot do this, so clients train one by one" in caplog.text
    assert history.reports[0].replies == 3 and history.summary["epsilon"] > 0


@pytest.mark.parametrize("strategy", [FedProx(mu=0.5), Scaffold(population=4)], ids=lambda one: type(one).__name__)
def test_whole_rounds_agree_with_one_by_one_but_for_the_noise(strategy: Any, without_noise: Callable[[], None]) -> None:
    # Everybody is in every batch, and there is no noise: two rounds, so that control variates are used.
    settings: dict[str, Any] = {
        "clients": 4,
        "rounds": 2,
        "private": private_of(),
        "training": Training(steps=2, batch_size=20, learning_rate=0.5),
    }
    results = []
    for engine in (Sequential(), Vectorised(clients_at_once=2)):
        without_noise()
        results.append(simulate(TASK, strategy, engine=engine, **settings).parameters)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "kind"),
    [(dense, Vectorised), (lambda: nn.Linear(1000, 300), Sequential), (lambda: nn.Linear(100, 300), Vectorised)],
    ids=["small", "large", "stack"],
)
def test_the_engine_that_suits_by_rule_goes_by_the_models_size(model: Callable[[], nn.Module], kind: type) -> None:
    training = Training(steps=1, batch_size=4)
    task = classification(model, train_data=lambda: labelled(30))
    simulation = Simulation(task, FedProx(mu=0.1), clients=3, private=private_of(), training=training, device="cpu")
    assert type(suitable(simulation.stage(InProcessMemory()))) is kind
