"""Whether what the server saw of one client gives its examples back, for batches of one, of four, and as configured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedml_core.data import Examples
from fedml_core.errors import FedveilError
from fedml_core.task import Task
from fedml_core.training import Training
from fedml_core.update import Update
from simulations.audit.example_site import AuditedTrainer
from simulations.audit.findings import Finding, Verdict
from simulations.audit.inversion import (
    Attack,
    as_rows,
    chance_db,
    first_dense,
    from_agreeing_rows,
    from_largest_row,
    from_optimisation,
    label_of,
)
from simulations.audit.views import View, views_of
from simulations.population import Population
from strategies.strategy import Strategy

__all__ = ["Case", "check_disclosure"]

RECOVERED_DB, BEYOND_CHANCE_DB = 25.0, 6.0
"""An example came back from so many dB on (5.6 % of the range off), and so far beyond what the mean input reaches."""
_CASES = (("one example", 1), ("four examples", 4), ("as configured", None))
_OPTIMISED = 8  # examples at most that an optimiser looks for
_STRONG = 10.0  # an epsilon up to which an input must not come back


@dataclass(frozen=True)
class Case:
    """What the attacks made of one view of one batch. `chance_db`: what the mean of all data reaches."""

    batch: str
    view: View
    attacks: Sequence[Attack] = field(repr=False)
    chance_db: float
    label_found: bool | None

    @property
    def best(self) -> Attack | None:
        """Return the attack that came closest."""
        return max(self.attacks, key=lambda attack: attack.psnr_db, default=None)

    @property
    def came_back(self) -> bool:
        """Return whether an attack recovered an example."""
        least = max(RECOVERED_DB, self.chance_db + BEYOND_CHANCE_DB)
        return self.best is not None and self.best.psnr_db >= least

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without the examples."""
        attacks = {one.name: {"psnr_db": one.psnr_db, "relative_error": one.relative_error} for one in self.attacks}
        return {
            "batch": self.batch,
            "seen_by": self.view.by,
            "hidden": self.view.hidden,
            "attacks": attacks,
            "chance_db": round(self.chance_db, 3),
            "label_found": self.label_found,
            "came_back": self.came_back,
        }


def check_disclosure(
    task: Task,
    strategy: Strategy,
    trainer: AuditedTrainer,
    population: Population,
    training: Training,
    *,
    epsilon: float | None,
    seed: int,
    steps: int = 300,
    noised: bool = False,
) -> tuple[Finding, list[Case]]:
    """Return whether inputs come back where the protection says that they do not, and every attack that was tried.

    Args: epsilon: claimed, or None. steps: of the optimiser. noised: whether the trainer hides examples by itself.
    """
    what = "gradient inversion"
    victim = _examples(population, 0)
    if task.classes is None or victim is None or len(victim.inputs) != 1 or not victim.inputs[0].is_floating_point():
        return Finding(what, Verdict.INFO, "attacks are for classes and one input of real numbers an example"), []
    cases: list[Case] = []
    for name, size in _CASES:
        batch = victim if size is None else victim.take(torch.arange(min(size, len(victim))))
        length = training if size is None else _one_step(training, len(batch))
        try:
            updates = _updates(trainer, population, batch, length, _others(strategy, population), size, seed)
            views = views_of(strategy, trainer.spec, trainer.initial(), updates[0], updates[1:], seed)
            views = [dataclasses.replace(view, hidden="yes") for view in views] if noised else views
        except FedveilError as error:
            return Finding(what, Verdict.WARN, f"no view could be made: {error}"), cases
        module = task.build(seed)
        cases += [_attacked(name, view, module, trainer, victim, batch, steps=steps, seed=seed) for view in views]
    return _judged(what, cases, epsilon), cases


def _attacked(
    name: str, view: View, module: nn.Module, trainer: AuditedTrainer, pool: Examples, batch: Examples, **search: int
) -> Case:
    inputs, everything = as_rows(batch.inputs[0]).float(), as_rows(pool.inputs[0]).float()
    low, high = float(everything.min()), float(everything.max())
    peak = max(high - low, 1e-12)
    trainer.spec.load(trainer.initial(), module)
    tensors = trainer.spec.views(view.values)
    found: dict[str, Tensor | None] = {}
    if dense := first_dense(module, trainer.spec):
        weight, bias = (tensors[name] for name in dense)
        if bool(bias.any()):
            found["largest row"] = from_largest_row(weight, bias)
            found["agreeing rows"] = from_agreeing_rows(weight, bias)
    # The last parameter is the output layer's bias in every model that has one; its shape says so.
    last = tensors[trainer.spec.parameters[-1].name]
    label = label_of(last) if len(batch) == 1 and last.dim() == 1 else None
    if len(batch) <= _OPTIMISED:
        labels = batch.targets if label is None or len(batch) > 1 else torch.tensor([label])
        found["optimisation"] = from_optimisation(
            module,
            view.values[: trainer.spec.parameter_count],
            labels.long(),
            batch.inputs[0].shape[1:],
            within=(low, high),
            **search,
        )
    attacks = [
        attack
        for method, rows in found.items()
        if rows is not None and len(rows) and (attack := Attack.best(method, rows, inputs, peak)) is not None
    ]
    told = None if label is None else label == int(batch.targets[0])
    return Case(name, view, attacks, chance_db(everything, inputs, peak), told)


def _judged(what: str, cases: Sequence[Case], epsilon: float | None) -> Finding:
    back = [case for case in cases if case.came_back]
    numbers = {"cases": [case.to_json() for case in cases], "epsilon": epsilon}
    broken = [case for case in back if case.view.hidden == "yes"]
    if broken:
        verdict = Verdict.FAIL if epsilon is None or epsilon <= _STRONG else Verdict.WARN
        said = f"{_said(broken[0])}, although the protection hides it"
        if verdict is Verdict.WARN:
            said = f"{_said(broken[0])}: an epsilon of {epsilon:.3g} allows that"
        return Finding(what, verdict, said, numbers)
    if sums := [case for case in back if case.view.hidden == "sum"]:
        said = f"{_said(sums[0])}: the sum hides whose it is, and not what it tells; add differential privacy"
        return Finding(what, Verdict.WARN, said, numbers)
    if back:
        return Finding(what, Verdict.PASS, f"{_said(back[0])}; nothing was claimed to hide it", numbers)
    return Finding(what, Verdict.PASS, f"no example came back from {len(cases)} views", numbers)


def _said(case: Case) -> str:
    assert case.best is not None
    error = case.best.relative_error
    return f"{case.view.by}, {case.batch}: an example came back with {case.best.psnr_db:.0f} dB ({error:.1g} off)"


def _updates(
    trainer: AuditedTrainer,
    population: Population,
    batch: Examples,
    training: Training,
    others: Sequence[int],
    size: int | None,
    seed: int,
) -> list[Update]:
    updates = [trainer.train(trainer.initial(), batch, training, round_number=1, key=(seed, "victim"))]
    for client in others:
        held = _examples(population, client)
        if held is None:
            continue
        part = held if size is None else held.take(torch.arange(min(size, len(held))))
        length = training if size is None else _one_step(training, len(part))
        updates.append(trainer.train(trainer.initial(), part, length, round_number=1, key=(seed, "other", client)))
    return updates


def _others(strategy: Strategy, population: Population) -> range:
    """Return who else is in a secure sum: as many as its protocol asks for, where it is one."""
    protocol: Any = getattr(strategy, "protocol", None)
    return range(1, min(len(population), protocol.minimum)) if protocol is not None else range(0)


def _one_step(training: Training, examples: int) -> Training:
    return Training(steps=1, batch_size=examples, learning_rate=training.learning_rate)


def _examples(population: Population, client: int) -> Examples | None:
    held = population.load(client).train
    return Examples(held.inputs, held.targets) if isinstance(held, Examples) and len(held) else None
