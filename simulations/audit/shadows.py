"""Membership inference against the run's last model, with shadow models that an attacker trains by himself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedml_core.checks import require_whole
from fedml_core.data import Examples
from fedml_core.errors import ConfigError
from fedml_core.privacy.membership import likelihood_ratios, logit_confidence, roc_area, tpr_at
from fedml_core.randomness import seeded
from fedml_core.task import Task
from fedml_core.training import Training
from simulations.audit.example_site import AuditedTrainer
from simulations.audit.findings import Finding, Verdict

__all__ = ["RATES", "Membership", "infer_membership", "require_shadows"]

RATES = (0.001, 0.01, 0.1)
"""The false-positive rates at which true positives are counted."""
_MOST_EXAMPLES = 2_000


@dataclass(frozen=True)
class Membership:
    """The attack's scores, of examples that were trained on and of others."""

    members: NDArray[np.float64] = field(repr=False)
    others: NDArray[np.float64] = field(repr=False)

    def numbers(self) -> dict[str, Any]:
        """Return true-positive rates and the area under their curve."""
        rates = {f"{rate:g}": tpr_at(self.members, self.others, rate) for rate in RATES}
        return {"tpr_at_fpr": rates, "area": roc_area(self.members, self.others), "examples": len(self.members)}


def require_shadows(name: str, count: int) -> None:
    """Raise ConfigError unless so many shadow models can be trained; `name`: what was set."""
    require_whole(name, count, at_least=0, at_most=256)
    if count == 1:
        raise ConfigError(f"{name} must be 0 or at least 2, got 1: each example is left out by half of them")


def infer_membership(
    task: Task,
    parameters: Tensor,
    training: Training,
    trainer: AuditedTrainer,
    *,
    passes: int,
    shadows: int,
    seed: int,
) -> tuple[Finding, Membership | None]:
    """Return how well an attacker tells the task's training data from its test data.

    Args: parameters: of the attacked model, trained on all training data and no test data. trainer: of shadow models,
        as that one was. passes: over its examples, of each. shadows: how many; each trains on half of all examples.
    """
    what = "membership"
    members, others = _pool(task, seed)
    if shadows == 0 or members is None or others is None:
        why = "no shadow models were asked for" if shadows == 0 else "the task has no pooled classes to compare"
        return Finding(what, Verdict.INFO, why), None
    both = Examples(
        tuple(torch.cat(pair) for pair in zip(members.inputs, others.inputs, strict=True)),
        torch.cat([members.targets, others.targets]),
    )
    mask = _halves(shadows, len(both), seed)
    length = training.model_copy(update={"epochs": passes, "steps": None, "learning_rate_decay": 1.0})
    rows = []
    for number, row in enumerate(mask):
        part = both.take(torch.from_numpy(np.flatnonzero(row)))
        update = trainer.train(trainer.initial(), part, length, round_number=1, key=(seed, "shadow", number))
        rows.append(_confidences(task, trainer, trainer.initial() + update.values, both, seed))
    target = _confidences(task, trainer, parameters, both, seed)
    scores = likelihood_ratios(target, np.stack(rows), mask)
    found = Membership(scores[: len(members)], scores[len(members) :])
    numbers = {**found.numbers(), "shadow_models": shadows}
    said = (
        f"{shadows} shadow models tell training examples apart with an area under the curve of {numbers['area']:.3f} "
        f"(0.5 is chance), {numbers['tpr_at_fpr']['0.01']:.1%} of them at 1 % false alarms"
    )
    return Finding(what, Verdict.INFO, said, numbers), found


def _pool(task: Task, seed: int) -> tuple[Examples | None, Examples | None]:
    if task.classes is None or task.train_data is None or task.test_data is None:
        return None, None
    pools = [task.train_data(), task.test_data()]
    if not all(isinstance(pool, Examples) and len(pool) >= 2 for pool in pools):
        return None, None
    size = min(_MOST_EXAMPLES, *(len(pool) for pool in pools))
    taken = []
    for name, pool in zip(("members", "others"), pools, strict=True):
        assert isinstance(pool, Examples)
        chosen = seeded(seed, name).choice(len(pool), size=size, replace=False)
        taken.append(Examples(pool.inputs, pool.targets).take(torch.from_numpy(np.sort(chosen))))
    return taken[0], taken[1]


def _halves(shadows: int, examples: int, seed: int) -> NDArray[np.bool_]:
    """Return which shadow trains on which example: half of them on each, chosen for each example by itself."""
    places = seeded(seed, "shadow halves").random((shadows, examples)).argsort(axis=0)
    return np.asarray(places < shadows // 2)


def _confidences(task: Task, trainer: AuditedTrainer, parameters: Tensor, data: Examples, seed: int) -> Any:
    module = task.build(seed)
    trainer.spec.load(parameters, module)
    module.eval()
    with torch.no_grad():
        outputs = module(*data.inputs)
    losses = F.cross_entropy(outputs, data.targets, reduction="none")
    return logit_confidence((losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses).double().numpy())
