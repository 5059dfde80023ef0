"""Models of all kinds on every engine: whatever it cannot do at once it does one by one, and the answer is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml_core import ClientData, Examples, Task, Training
from server import History
from simulations import Auto, Engine, Fused, Processes, Sequential, Vectorised, simulate
from strategies import FedAvg

SIZES = [7, 1, 4, 12, 9, 3]
CLASSES, WORDS = 3, 11


class Encoder(nn.Module):
    """A small transformer over tokens."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.leave = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.leave(self.layer(self.embed(tokens)).mean(dim=1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A classifier that reads tokens one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(WORDS, 6), nn.GRU(6, 8, batch_first=True)
        self.leave = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.leave(self.read(self.embed(tokens))[0][:, -1])  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions around which the input passes, with a normalisation of choice."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList([norm(width), norm(width)])

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(torch.relu(self.norms[0](self.first(x))))
        return torch.relu(x + self.norms[1](inner))


def residual(norm: Callable[[int], nn.Module]) -> nn.Module:
    blocks = [Block(4, norm), nn.MaxPool2d(2), Block(4, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *blocks, nn.Linear(4, CLASSES))


def bag_of_words() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(WORDS, 8, mode="mean"), nn.ReLU(), nn.Linear(8, CLASSES))


TOKENS, IMAGES = (6,), (2, 8, 8)
MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transformer": (Encoder, TOKENS),
    "transformer-dropout": (lambda: Encoder(dropout=0.1), TOKENS),
    "gru": (Recurrent, TOKENS),
    "resnet-groupnorm": (lambda: residual(lambda width: nn.GroupNorm(2, width)), IMAGES),
    "resnet-batchnorm": (lambda: residual(nn.BatchNorm2d), IMAGES),
    "bag-of-words": (bag_of_words, TOKENS),
}
NOT_SIDE_BY_SIDE = {
    "transformer-dropout": "layer layer.self_attn (MultiheadAttention) cannot be vectorised: it draws random numbers",
    "bag-of-words": "layer 0 (EmbeddingBag) cannot be vectorised",
}
"""Models that are trained one by one by the vectorised engine, and the reason that it gives."""
ENGINES: list[Engine] = [
    Vectorised(clients_at_once=4),
    Fused(clients_at_once=4),
    Processes(workers=2, inner=Vectorised(clients_at_once=3)),
    Auto(workers=1),
    Auto(workers=2),
]


def examples(shape: tuple[int, ...], client: int) -> Examples:
    generator = torch.Generator().manual_seed(client)
    size = SIZES[client]
    if shape == TOKENS:
        inputs = torch.randint(0, WORDS, (size, *shape), generator=generator)
    else:
        inputs = torch.randn(size, *shape, generator=generator)
    return Examples.of(inputs, torch.randint(0, CLASSES, (size,), generator=generator))


def run(name: str, engine: Engine) -> History:
    model, shape = MODELS[name]
    task = Task.classification(
        model=model, classes=CLASSES, client_data=lambda client: ClientData(examples(shape, client))
    )
    return simulate(
        task,
        FedAvg(),
        clients=len(SIZES),
        rounds=2,
        training=Training(batch_size=4, epochs=2, learning_rate=0.05),
        engine=engine,
        seed=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def expected() -> Mapping[str, History]:
    torch.set_num_threads(1)
    return {name: run(name, Sequential()) for name in MODELS}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def shown(engine: Engine) -> str:
    return f"{engine.name}-{engine.workers}" if isinstance(engine, Processes | Auto) else engine.name


@pytest.mark.parametrize("engine", ENGINES, ids=shown)
@pytest.mark.parametrize("name", MODELS)
def test_every_engine_trains_every_model_to_the_answer_of_one_after_the_other(
    name: str, engine: Engine, expected: Mapping[str, History], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, wanted = run(name, engine), expected[name]
    largest = float(wanted.parameters.abs().max())
    difference = float((found.parameters - wanted.parameters).abs().max())
    assert difference <= 1e-5 * largest, f"{difference / largest:.1e} of the largest parameter"
    for one, other in zip(wanted.reports, found.reports, strict=True):
        assert (one.participants, one.excluded) == (other.participants, other.excluded)
        assert dict(other.metrics["train"]) == pytest.approx(dict(one.metrics["train"]), rel=1e-4)
    said = {record.getMessage() for record in caplog.records}
    if isinstance(engine, Fused):
        (line,) = said
        assert "the fused engine cannot do this, so clients train one by one" in line
    elif not isinstance(engine, Auto):
        reason = NOT_SIDE_BY_SIDE.get(name)
        assert len(said) == (0 if reason is None else 1)
        assert all(
            f"the vectorised engine cannot do this, so clients train one by one: {reason}" in one for one in said
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_is_compared_has_been_trained(name: str, expected: Mapping[str, History]) -> None:
    first, last = (expected[name].reports[number].metrics["train"]["loss"] for number in (0, 1))
    assert abs(first - last) > 1e-3
