"""A site's policy: what it takes part in, checked in its own process before it trains. Its numbers are in site.toml.

What a site can check by itself is told from what it must believe: masks, and noise that it draws itself, are its own
doing; noise that the server says it will add is a promise, and counts as "central" only.

Guarantees: nothing that a server sends changes the policy; what does not meet it is refused with the rule's key and the
    numbers, before any data is read.
Guarantees: noise that is less than its floor protects nothing in the policy's eyes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from clients.asked import AT_SERVER, LOCAL, SUMS, Asked, Event, clip_norm, mechanisms, multiplier, parts, update_norm
from fedml_core.errors import RefusalError
from fedml_core.policy_tables import FloorTable, PolicyTable
from fedml_core.weighting import Uniform, Weigh

__all__ = ["Policy"]


@dataclass(frozen=True)
class Policy:
    """What one site takes part in, as the [policy] of its site.toml says."""

    table: PolicyTable = PolicyTable()

    def check(self, asked: Asked) -> frozenset[str]:
        """Return what protects the update, once everything about the work is within the policy.

        Raises: RefusalError: otherwise; `rule` is the key of the site.toml. PrivacyError: for an event that is none.
        """
        self._check_names(asked)
        self._check_numbers(asked)
        return self._check_protection(asked)

    def check_evaluation(self, run: str, server: str, round_number: int) -> None:
        """Check that the site evaluates models for this run.

        Raises: RefusalError: if it does not.
        """
        _match("runs", "run", run, self.table.runs)
        _match("servers", "server", server, self.table.servers)
        _at_most("maximum_rounds", "round {}", round_number, self.table.maximum_rounds)
        if not self.table.metrics.evaluate:
            raise RefusalError("metrics.evaluate", "this site's metrics.evaluate is false: it evaluates for nobody")

    def check_example(self, event: Event) -> None:
        """Check the event of the site's own training before its first step.

        Raises: RefusalError: if its noise is less than the floor. PrivacyError: if it is no event.
        """
        floor = self.table.example
        for term, part in mechanisms(event):
            _check_floor("example", floor, multiplier(part), term.rate)

    def _check_names(self, asked: Asked) -> None:
        table = self.table
        _match("runs", "run", asked.run, table.runs)
        _match("servers", "server", asked.server, table.servers)
        _match("optimizers", "optimizer", asked.training.optimizer, table.optimizers)
        for part in parts(asked.pipeline):
            if table.transforms is not None and type(part).__name__ not in table.transforms:
                allowed = ", ".join(table.transforms) or "none"
                raise RefusalError(
                    "transforms",
                    f"the server asks for the transform {type(part).__name__}, this site's transforms are {allowed}",
                )
            if table.uniform_weights and isinstance(part, Weigh) and not isinstance(part.by, Uniform):
                raise RefusalError(
                    "uniform_weights",
                    f"the server weighs sites by {type(part.by).__name__}, and this site's uniform_weights is true; it "
                    "must count every site alike",
                )

    def _check_numbers(self, asked: Asked) -> None:
        table, training = self.table, asked.training
        _at_most("maximum_rounds", "round {}", asked.round, table.maximum_rounds)
        _at_most(
            "maximum_participations",
            "this site's participation {} in the run",
            asked.participation,
            table.maximum_participations,
        )
        if training.steps is not None:
            _at_most("maximum_steps", "{} steps in a round", training.steps, table.maximum_steps)
            if table.maximum_steps is None and table.maximum_epochs is not None:
                raise RefusalError(
                    "maximum_epochs",
                    f"the server asks for {training.steps} steps in a round, this site's maximum_epochs is "
                    f"{table.maximum_epochs} and says nothing of steps; it must ask for epochs",
                )
            return
        _at_most("maximum_epochs", "{} epochs in a round", training.epochs, table.maximum_epochs)
        if table.maximum_steps is not None and table.maximum_epochs is None:
            raise RefusalError(
                "maximum_steps",
                f"the server asks for {training.epochs} epochs in a round, this site's maximum_steps is "
                f"{table.maximum_steps} and says nothing of epochs; it must ask for steps",
            )

    def _check_protection(self, asked: Asked) -> frozenset[str]:
        found, short = self._protections(asked)
        for choice in self.table.accept:
            if choice == "none" or found.issuperset(choice.split("+")):
                return found
        wanted = {word for choice in self.table.accept for word in choice.split("+")}
        for name, refusal in short.items():
            if name in wanted:
                raise refusal
        raise RefusalError(
            "accept",
            f"the server's work is protected by {' and '.join(sorted(found)) or 'nothing'} that this site can see, it "
            f"accepts {' or '.join(self.table.accept)}",
        )

    def _protections(self, asked: Asked) -> tuple[frozenset[str], dict[str, RefusalError]]:
        """Return what protects, and what was meant to protect and falls short, with its refusal."""
        found, short = set[str](), dict[str, RefusalError]()
        if asked.secure is not None:
            found.add("secure-aggregation")
        if asked.example:  # its noise is checked when the trainer reserves it
            found.add("example")
        for name, check in (
            ("central", self._check_central),
            ("distributed", self._check_distributed),
            ("local", self._check_local),
        ):
            try:
                if check(asked):
                    found.add(name)
            except RefusalError as refusal:
                short[name] = refusal
        return frozenset(found), short

    def _check_central(self, asked: Asked) -> bool:
        if asked.promised is None:
            return False
        noise = [(term, part) for term, part in mechanisms(asked.promised) if part.name in AT_SERVER]
        if not noise:
            return False
        if not asked.pipeline.l2_bound(math.inf) < math.inf:
            raise RefusalError(
                "central",
                "the server promises noise and asks for an update that nothing clips, so no noise could cover it; it "
                "must clip",
            )
        self._check_clip("central", self.table.central, update_norm(asked))
        for term, part in noise:
            _check_floor("central", self.table.central, multiplier(part), term.rate)
        return True

    def _check_distributed(self, asked: Asked) -> bool:
        noise = [(term, part) for term, part in mechanisms(asked.own_event) if part.name in SUMS]
        if not noise:
            return False
        if asked.secure is None:
            raise RefusalError(
                "distributed",
                "the server asks for a share of the noise without a secure sum, in which alone the shares protect; it "
                "must ask for one",
            )
        for term, part in noise:
            if part["clients"] > asked.secure.honest:
                raise RefusalError(
                    "distributed",
                    f"the noise needs {part['clients']:.0f} honest members, and the secure sum may have as few as "
                    f"{asked.secure.honest}; it must ask for a larger minimum or for more noise",
                )
            self._check_clip("distributed", self.table.distributed, part["l2"])
            _check_floor("distributed", self.table.distributed, multiplier(part), term.rate)
        return True

    def _check_local(self, asked: Asked) -> bool:
        noise = [(term, part) for term, part in mechanisms(asked.own_event) if part.name == LOCAL]
        if not noise:
            return False
        self._check_clip("local", self.table.local, clip_norm(asked))
        for term, part in noise:
            _check_floor("local", self.table.local, multiplier(part), term.rate)
        return True

    def _check_clip(self, kind: str, floor: FloorTable, norm: float) -> None:
        most = floor.maximum_clip_norm
        if most is not None and not norm <= most:
            raise RefusalError(
                f"{kind}.maximum_clip_norm",
                f"the server lets this site's update be {norm:g} long, its {kind}.maximum_clip_norm is {most:g}; it "
                "must clip shorter",
            )


def _check_floor(kind: str, floor: FloorTable, multiplier: float, rate: float) -> None:
    if not multiplier >= floor.minimum_noise_multiplier:
        raise RefusalError(
            f"{kind}.minimum_noise_multiplier",
            f"noise_multiplier {multiplier:g} is below this site's {kind}.minimum_noise_multiplier "
            f"{floor.minimum_noise_multiplier:g}; more noise is needed",
        )
    most = floor.maximum_sampling_rate
    if most is not None and not rate <= most:
        raise RefusalError(
            f"{kind}.maximum_sampling_rate",
            f"the sampling rate {rate:g} is above this site's {kind}.maximum_sampling_rate {most:g}",
        )


def _match(rule: str, what: str, name: str, patterns: list[str] | None) -> None:
    if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
        raise RefusalError(rule, f"the {what} is {name!r:.80}, this site's {rule} are {', '.join(patterns)}")


def _at_most(rule: str, what: str, asked: int, most: int | None) -> None:
    if most is not None and asked > most:
        raise RefusalError(rule, f"the server asks for {what.format(asked)}, this site's {rule} is {most}")
