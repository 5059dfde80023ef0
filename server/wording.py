"""How numbers and trust are said to people: the same words in progress lines, summaries, reports and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.round import RoundReport

PLACES = {"server": "test data", "clients": "clients' held-out data", "train": "training"}
"""The places of metrics, the most telling first, and what they are measured on."""

_SUM_ONLY = "only the sum of the participants' updates"
_NO_NOISE = "nothing hides what a sum tells by itself"
_SERVER_SAW = {
    "none": "every update of every participant; nothing was hidden from it",
    "secure aggregation (SecAgg+, active server)": (
        f"{_SUM_ONLY}, even if it breaks the protocol, while no more of them collude with it than stated; {_NO_NOISE}"
    ),
    "secure aggregation (SecAgg+, semi-honest server)": (
        f"{_SUM_ONLY}, as long as it follows the protocol (semi-honest); {_NO_NOISE}"
    ),
    "secure aggregation (assisted, active server)": (
        f"{_SUM_ONLY}, even if it breaks the protocol, while no more assistants collude with it than stated; "
        f"{_NO_NOISE}"
    ),
    "secure aggregation (assisted, semi-honest server)": (
        f"{_SUM_ONLY}, as long as it follows the protocol and no more assistants collude with it than stated; "
        f"{_NO_NOISE}"
    ),
}
_WITHOUT_MASKS = "; simulated without masks)"


def server_saw(protection: str) -> str:
    """Return what the server could see under a protection, as `Strategy.protection` names it.

    Example:
        >>> server_saw("none")
        'every update of every participant; nothing was hidden from it'
    """
    if protection.endswith(_WITHOUT_MASKS):
        return "every update of every participant: the masks were left out of this simulation"
    return _SERVER_SAW.get(protection, protection)


def headline(report: RoundReport) -> tuple[str, Mapping[str, float]]:
    """Return the most telling place of a round's metrics and its metrics, without the number of examples."""
    for place in PLACES:
        if place in report.metrics:
            return place, {name: value for name, value in report.metrics[place].items() if name != "examples"}
    return "", {}


def privacy_terms(privacy: Mapping[str, Any] | None) -> str:
    """Return what an epsilon is worth nothing without, to be said behind it.

    Example:
        >>> privacy_terms({"delta": 1e-5, "unit": "client", "adjacency": "replace-one", "sampling": "none"})
        ' at delta 1e-05 (unit client, adjacency replace-one, sampling none)'
    """
    if not privacy:
        return ""
    named = ", ".join(
        f"{name} {privacy[name]}" for name in ("unit", "adjacency", "sampling", "accountant") if name in privacy
    )
    return f" at delta {privacy['delta']:g} ({named})"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return metrics in one line.

    Example:
        >>> metrics_text({"examples": 360, "loss": 0.31251, "accuracy": 0.94})
        'loss 0.3125, accuracy 0.9400'
    """
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "examples")


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units.

    Example:
        >>> bytes_text(999), bytes_text(1_234_567)
        ('999 B', '1.2 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if round(count, 1) < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def seconds_text(seconds: float) -> str:
    """Return a duration to two places.

    Example:
        >>> seconds_text(4.21), seconds_text(75), seconds_text(7300)
        ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
