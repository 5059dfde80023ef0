"""A run's summary as people read it: what came out, what it cost, and what the server could see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedml_core.privacy.terms import epsilon_text
from server.round import RoundReport
from server.uncovered import uncovered_text
from server.wording import PLACES, bytes_text, metrics_text, privacy_terms, seconds_text, server_saw

Row = tuple[str, str]


def summary_rows(summary: Mapping[str, Any], reports: Sequence[RoundReport]) -> list[Row]:
    """Return a run's summary as rows of a name and what it is.

    `summary`: as `server.history.summarise` makes it; `central` in it are the metrics of the central baseline.
    """
    rows = [("rounds", _rounds(summary, reports))]
    metrics = summary["metrics"]
    told = {label: metrics_text(metrics[place]) for place, label in PLACES.items() if place in metrics}
    rows += [(label, text) for label, text in told.items() if text]
    if "central" in summary:
        rows.append(("central baseline", _central(summary["central"], metrics.get("server", {}))))
    up, down = bytes_text(summary["bytes_up"]), bytes_text(summary["bytes_down"])
    rows += [
        ("traffic", f"{up} up, {down} down"),
        ("replies", _replies(summary, reports)),
        ("server saw", server_saw(summary["protection"])),
        ("privacy", _privacy(summary)),
        *_not_covered(summary),
        ("time", seconds_text(summary["seconds"])),
    ]
    if reports and reports[-1].virtual_clock is not None:
        rows.append(("virtual time", seconds_text(reports[-1].virtual_clock)))
    return rows + [_target(metric, **found) for metric, found in summary.get("targets", {}).items()]


def excluded_by_rule(reports: Sequence[RoundReport]) -> Mapping[str, int]:
    """Return how many replies each rule excluded, the most frequent first."""
    counts = Counter(exclusion.rule for report in reports for exclusion in report.excluded)
    return dict(counts.most_common())


def _rounds(summary: Mapping[str, Any], reports: Sequence[RoundReport]) -> str:
    text = f"{summary['rounds']}{', stopped early' if summary.get('stopped_early') else ''}"
    if not summary["void_rounds"]:
        return text
    why = next((report.why for report in reversed(reports) if report.status == "void"), "")
    return f"{text}, {summary['void_rounds']} of them void; the last because {why}"


def _central(central: Mapping[str, float], federated: Mapping[str, float]) -> str:
    shared = [name for name in central if name in federated and name != "examples"]
    gaps = ", ".join(f"{name} {federated[name] - central[name]:+.4f}" for name in shared)
    return f"{metrics_text(central)}; federated against central: {gaps or 'nothing to compare'}"


def _replies(summary: Mapping[str, Any], reports: Sequence[RoundReport]) -> str:
    asked, counted = sum(report.cohort for report in reports), sum(report.replies for report in reports)
    text = f"{counted} of {asked} counted"
    if summary["missing_replies"]:
        text += f", {summary['missing_replies']} missing"
    rules = ", ".join(f"{rule} {count}" for rule, count in excluded_by_rule(reports).items())
    return f"{text}, {summary['excluded_replies']} excluded ({rules})" if rules else text


def _target(metric: str, target: float, round: int | None, virtual_seconds: float | None) -> Row:
    when = "" if virtual_seconds is None else f", after {seconds_text(virtual_seconds)} of virtual time"
    return f"{metric} {target:g}", "not reached" if round is None else f"in round {round}{when}"


def _not_covered(summary: Mapping[str, Any]) -> list[Row]:
    said = uncovered_text(summary.get("privacy"), summary.get("example_privacy"))
    return [("beside it", said)] if said else []


def _privacy(summary: Mapping[str, Any]) -> str:
    epsilon = summary["epsilon"]
    if epsilon is None:
        return "no differential privacy: epsilon has no bound"
    said = f"epsilon {epsilon_text(epsilon)} so far{privacy_terms(summary.get('privacy'))}"
    examples = summary.get("example_privacy")
    if examples is None:
        return said
    if examples == summary.get("privacy"):
        return f"{said}, of the client that trained most often"
    second = f"epsilon {epsilon_text(examples['epsilon'])} so far{privacy_terms(examples)}"
    return f"{said}; and {second}, of the client that trained most often"
