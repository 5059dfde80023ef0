"""Simulated clients that protect their examples by DP-SGD, each as a real site does whose site.toml has [examples]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.memory_layout import MemoryLayout
from fedml_core.policy_tables import BudgetTable
from fedml_core.task import Task
from fedml_core.training import Training

if TYPE_CHECKING:
    from clients.private_trainer import PrivateTorchTrainer
    from clients.private_training import PrivateTraining
    from fedml_core.privacy.terms import Terms

__all__ = ["EXAMPLES_DIFFER", "NOISE_IS_FRESH", "PrivateClients", "require_counted"]

EXAMPLES_DIFFER = "add-or-remove-one"
"""How two data sets differ that DP-SGD with Poisson batches cannot tell apart."""

NOISE_IS_FRESH = "private training draws fresh noise each time, so deterministic = true cannot be kept"


@dataclass(frozen=True)
class PrivateClients:
    """How every client of a run trains, and the event that its account is charged for each training.

    It travels to worker processes, which reach no account: what they train was charged before they were told of it.
    """

    private: PrivateTraining
    event: Mapping[str, Any]

    @classmethod
    def of(cls, private: PrivateTraining, training: Training) -> PrivateClients:
        """Return the clients of a run whose rounds train as `training` says."""
        return cls(private, private.event(training))

    def trainer(
        self, task: Task, seed: int, *, device: str, memory_layout: MemoryLayout = "auto"
    ) -> PrivateTorchTrainer:
        """Return what trains one client after the other.

        Raises: TaskError: if the model cannot be private, with what to use instead.
        """
        from clients.private_trainer import PrivateTorchTrainer  # loads Opacus, which other runs do without

        return PrivateTorchTrainer(
            task, self.private, self.require_charged, seed=seed, device=device, memory_layout=memory_layout
        )

    def require_charged(self, event: Mapping[str, Any]) -> None:
        """Refuse a training that is another one than accounts are charged for.

        Raises: PrivacyError: then.
        """
        if event != self.event:
            raise PrivacyError(
                f"every client's account was charged {dict(self.event)}, and the training is {dict(event)}; train as "
                "the run's plan says"
            )

    def protection(self) -> str:
        """Return what protects an update, as reports name it."""
        private = self.private
        return (
            f"example-level DP (DP-SGD at every client, {type(private.clipping).__name__} to "
            f"{private.clipping.clip_norm:g}, noise multiplier {private.noise_multiplier:g}, sampling rate "
            f"{private.sampling_rate:g}; nobody else is trusted)"
        )

    def settings(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged."""
        private = self.private
        return {
            "noise_multiplier": private.noise_multiplier,
            "clipping": repr(private.clipping),
            "sampling_rate": private.sampling_rate,
        }


def require_counted(budget: BudgetTable, terms: Terms | None, *, examples: bool) -> None:
    """Refuse a limit for what nothing protects.

    Args: terms: of the strategy. examples: whether clients protect their examples.
    Raises: ConfigError: with the unit, and what could protect it.
    """
    protected = [*([] if terms is None else [terms.unit]), *(["example"] if examples else [])]
    if budget.limited and budget.unit not in protected:
        raise ConfigError(
            f"the budget counts the unit {budget.unit}, and this run protects {' and '.join(protected) or 'nothing'}; "
            "name what it protects as unit in [budget], or set no limit"
        )
