"""A trainer computes where it was asked to, spreads over GPUs in turn, and says what a machine has."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn

from clients.torch_trainer import TorchTrainer
from fedml_core import devices
from fedml_core.devices import choose_device, gradient_scaler, precision_context, seeded_torch
from fedml_core.errors import ConfigError
from fedml_core.training import Precision, Training
from fedml_core.transform import Guide
from tests.clients.trainer_cases import classification, drawn, labelled, trained


def test_auto_takes_gpus_in_turn_then_apples_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_available", lambda: ["cpu", "cuda:0", "cuda:1", "cuda:2", "mps"])
    chosen = [str(choose_device(name)) for name in ("auto", "cuda", "auto", "auto")]
    assert sorted(chosen[:3]) == ["cuda:0", "cuda:1", "cuda:2"]
    assert chosen[3] == chosen[0]
    assert str(choose_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(devices, "_available", lambda: ["cpu", "mps"])
    assert str(choose_device()) == "mps"
    monkeypatch.setattr(devices, "_available", lambda: ["cpu"])
    assert str(choose_device()) == "cpu"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:9", "mps", "tpu", "CPU "])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_available", lambda: ["cpu"])
    with pytest.raises(ConfigError, match=f"device '{name}' is not available; this machine has cpu, or say auto"):
        TorchTrainer(classification(), device=name)


def test_a_precision_that_torch_only_warns_about_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsupported:
        def __init__(self, *arguments: object, **named: object) -> None:
            warnings.warn("in this autocast, the target dtype is not supported. Disabling.", stacklevel=1)

    monkeypatch.setattr(torch, "autocast", Unsupported)
    with pytest.raises(ConfigError, match="precision bfloat16 is not available on cpu; use float32"):
        precision_context("bfloat16", torch.device("cpu"))


def test_only_float16_is_scaled() -> None:
    cpu = torch.device("cpu")
    assert [gradient_scaler(precision, cpu) is None for precision in ("float32", "bfloat16", "float16")] == [
        True,
        True,
        False,
    ]


def test_seeded_torch_draws_the_same_inside_and_nothing_outside() -> None:
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded_torch(5, torch.device("cpu")):
            draws.append(torch.rand(3))
    with pytest.raises(KeyError), seeded_torch(6, torch.device("cpu")):
        draws.append(torch.rand(3))
        raise KeyError
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_trains_as_the_cpu_does(precision: Precision) -> None:
    task = classification(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    training = Training(epochs=2, batch_size=4, optimizer_arguments={"momentum": 0.5}, precision=precision)
    data, guide = labelled(21, weights=drawn(21, seed=3).abs()), Guide(0.1, 0.01 * drawn(91, seed=4))
    trainers = [TorchTrainer(task, device=device) for device in ("cpu", "cuda")]
    before = torch.cuda.get_rng_state()
    cpu, gpu = (trained(trainer, data, training, guide=guide) for trainer in trainers)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.allclose(cpu.values, gpu.values, atol=1e-4 if precision == "float32" else 3e-2)
    assert gpu.values.device.type == "cpu"
    one, two = (trainer.evaluate(trainer.initial() + cpu.values, data) for trainer in trainers)
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_dropout_from_the_key() -> None:
    task = classification(lambda: nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)))
    one, two = (trained(TorchTrainer(task, device="cuda"), labelled(), key=(1,)) for _ in range(2))
    assert torch.allclose(one.values, two.values, atol=1e-6)
    other = trained(TorchTrainer(task, device="cuda"), labelled(), key=(2,))
    assert not torch.allclose(one.values, other.values, atol=1e-3)


def test_small_dense_models_take_one_thread_and_give_the_others_back() -> None:
    assert devices.fitting_threads(nn.Linear(100, 100)) == 1
    assert devices.fitting_threads(nn.Linear(1000, 1001)) is None
    assert devices.fitting_threads(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())) is None
    torch.set_num_threads(2)
    with pytest.raises(KeyError), devices.seeded_torch(0, torch.device("cpu"), 1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2
    with devices.seeded_torch(0, torch.device("cpu")):
        assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_deterministic_torch_lasts_as_long_as_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(KeyError), devices.deterministic_torch():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_torch_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with devices.deterministic_torch():
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
    with devices.deterministic_torch(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_trainer_trains_and_evaluates_so_and_names_what_cannot_be() -> None:
    seen: list[bool] = []

    class Watching(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().forward(x)

    task = classification(lambda: Watching(5, 3))
    trainer = TorchTrainer(task, device="cpu", deterministic=True)
    update = trained(trainer, labelled())
    trainer.evaluate(trainer.initial(), labelled())
    assert len(seen) > 2 and all(seen) and not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(update.values, trained(TorchTrainer(task, device="cpu"), labelled()).values)
