"""Private training: settings, models and numbers that are refused, each with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clients.per_example import AdaptiveClipping
from fedml_core.errors import ConfigError, TaskError
from fedml_core.training import Training
from tests.clients.private_cases import private_of, trained, trainer_of
from tests.clients.trainer_cases import classification, labelled

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_gradient_norm": 1.0}, "max_gradient_norm 1 would clip gradients that are clipped by example"),
    ({"precision": "bfloat16"}, "private training bounds gradients in float32, got bfloat16"),
    ({"optimizer": "LBFGS"}, "LBFGS evaluates the loss as often as it likes"),
    ({"optimizer": "sdg"}, "unknown optimizer 'sdg'"),
]


@pytest.mark.parametrize(("setting", "message"), REFUSED)
def test_settings_that_private_training_has_not_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        trained(trainer_of(), labelled(), Training(steps=1, **setting))


def _half() -> nn.Module:
    return nn.Linear(5, 3).to(torch.bfloat16)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.last = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)


MODELS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), "layer 1 (BatchNorm1d)"),
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), "use torch.nn.GroupNorm(8, 8)"),
    # Opacus looks at trainable layers only, and these two are none; they normalise by the batch all the same.
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False)), "use torch.nn.GroupNorm"),
    (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8).requires_grad_(False)), "use torch.nn.GroupNorm"),
    (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.InstanceNorm1d(8, track_running_stats=True)),
        "set track_running_stats=False",
    ),
    (Recurrent, "use opacus.layers.DPLSTM"),
    (_half, "weight is torch.bfloat16; call .float()"),
]


@pytest.mark.parametrize(("model", "message"), MODELS)
def test_models_that_cannot_be_private_are_refused_with_what_to_use_instead(
    model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(TaskError, match=re.escape(message)):
        trainer_of(classification(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier must be"),
        ({"sampling_rate": 0.0}, "sampling_rate must be"),
        ({"sampling_rate": 1.5}, "sampling_rate must be"),
        ({"max_physical_batch": 0}, "max_physical_batch must be"),
        ({"gradients": "goast"}, "unknown gradients 'goast'"),
        ({"clipping": 1.0}, "clipping must say how gradients are clipped"),
        ({"noise_multiplier": 20.0, "clipping": AdaptiveClipping(1.0)}, "count_noise must be > noise_multiplier / 2"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        private_of(**changes)
