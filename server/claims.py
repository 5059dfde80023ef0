"""What a round's report says of privacy: the strategy's own claim, or that of clients who protect examples, or both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from strategies.strategy import Strategy

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["ProtectsExamples", "privacy_fields", "with_examples"]


@runtime_checkable
class ProtectsExamples(Protocol):
    """A channel that knows what its clients' private training has cost, such as a simulation's."""

    def example_privacy(self) -> tuple[str, Claim] | None:
        """Return what protects examples, in words, and what the worst client's have cost so far; or None."""
        ...


def privacy_fields(strategy: Strategy, claim: Claim | None, channel: object) -> dict[str, Any]:
    """Return a report's `protection`, `epsilon`, `privacy` and `example_privacy`.

    `claim`: the strategy's own. Where it has none, `epsilon` and `privacy` are about examples, if these are protected.
    """
    found = channel.example_privacy() if isinstance(channel, ProtectsExamples) else None
    protection = strategy.protection()
    if found is not None:
        protection = with_examples(protection, found[0])
    first = claim or (None if found is None else found[1])
    return {
        "protection": protection,
        "epsilon": None if first is None else first.epsilon,
        "privacy": None if first is None else first.to_json(),
        "example_privacy": None if found is None else found[1].to_json(),
    }


def with_examples(protection: str, examples: str) -> str:
    """Return a strategy's protection and what protects examples, as reports name both.

    Example:
        >>> with_examples("none", "example-level DP"), with_examples("central DP", "example-level DP")
        ('example-level DP', 'central DP + example-level DP')
    """
    return examples if protection == "none" else f"{protection} + {examples}"
