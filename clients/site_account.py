"""What a site says of its privacy once a run is over: what protected its updates, and what its own ledger counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from clients.gate import Gate
from fedml_core.errors import FedveilError

if TYPE_CHECKING:
    from fedml_core.privacy.accounting import Claim

__all__ = ["account_text", "finite_claim"]


def finite_claim(gate: Gate, run: str | None, tell: Callable[[FedveilError], object]) -> Claim | None:
    """Return what a run has cost a site's data, or None without a bound. `tell`: is given why nothing can be said."""
    try:
        claim = None if run is None else gate.spent(run)
    except FedveilError as error:
        tell(error)
        return None
    return None if claim is None or math.isinf(claim.epsilon) else claim


def account_text(protection: str, claim: Claim | None) -> str:
    """Return in one line what protected a site's last update, and what the run has cost its data."""
    if claim is None:
        return f"protected by {protection}; no differential privacy that can be counted: epsilon has no bound"
    return f"protected by {protection}; this run has cost {claim}"
