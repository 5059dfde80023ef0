"""From numbers to verdicts: claims against canaries, and transcripts of secure sums against their signatures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedml_core.privacy.auditing import Estimate
from fedml_core.privacy.membership import tpr_at
from server.history import TRANSCRIPT
from simulations.audit.findings import Finding, Verdict
from simulations.audit.shadows import RATES
from strategies.strategy import Strategy

__all__ = ["judge_canaries", "judge_transcripts"]

_TOO_WEAK = 0.1  # of the claimed epsilon: an estimate below it tells nothing
_MOST_CHECKED = 50


def judge_canaries(
    claim: Mapping[str, Any] | None,
    every: Estimate,
    final: Estimate,
    one_run: tuple[float, int, int],
    scores: tuple[NDArray[np.float64], NDArray[np.float64]],
    lost: int,
) -> Finding:
    """Return whether canaries could tell more than the claim allows.

    Args: every, final: estimates from all rounds and from the last model alone. one_run: bound, guesses, right ones.
        scores: of included and excluded canaries. lost: canaries' replies that the server excluded.
    """
    bound = one_run[0]
    numbers = {
        "claimed": None if claim is None else claim["epsilon"],
        "estimate": every.epsilon,
        "estimate_sd": every.sd,
        "estimate_lower_95": every.lower,
        "final_model_estimate": final.epsilon,
        "final_model_sd": final.sd,
        "one_run_bound_95": bound,
        "one_run_guesses": one_run[1],
        "one_run_correct": one_run[2],
        "tpr_at_fpr": {f"{rate:g}": tpr_at(*scores, rate) for rate in RATES},
        "lost_replies": lost,
        "threat_models": ["all rounds", "final model"],
    }
    said = f"canaries estimate epsilon {every.epsilon:.3g} +- {every.sd:.2g}, and prove {bound:.3g} at 95 %"
    if claim is None:
        return Finding("canaries", Verdict.INFO, f"{said}; no epsilon is claimed for clients", numbers)
    claimed = float(claim["epsilon"])
    if max(bound, every.lower) > claimed:
        return Finding("canaries", Verdict.FAIL, f"{said}; claimed is {claimed:.3g}", numbers)
    if lost:
        said = f"{lost} replies of canaries were excluded, so the audit saw less than clients may send; {said}"
        return Finding("canaries", Verdict.WARN, said, numbers)
    if every.epsilon < _TOO_WEAK * claimed:
        return Finding("canaries", Verdict.WARN, f"{said}; too weak an audit for the claimed {claimed:.3g}", numbers)
    return Finding("canaries", Verdict.PASS, f"{said}; claimed is {claimed:.3g}", numbers)


def judge_transcripts(folder: Path, strategy: Strategy, about: str = "") -> Finding:
    """Return whether the transcripts of the run's secure sums fit together. `about`: which sums these are."""
    what = "secure sums"
    path = folder / TRANSCRIPT
    if not strategy.takes_secure_sums:
        return Finding(what, Verdict.INFO, "updates are not summed by a protocol that hides them")
    if not path.exists():
        return Finding(what, Verdict.WARN, "the secure sums left no transcript to check")
    from fedml_core.secagg import transcript  # loads cryptography

    lines = path.read_text(encoding="utf-8").splitlines()
    checked = [finding for line in lines[:_MOST_CHECKED] for finding in transcript.check(json.loads(line))]
    failed = [finding for finding in checked if finding.verdict is transcript.Verdict.FAILED]
    counts = {str(kind): sum(one.verdict is kind for one in checked) for kind in transcript.Verdict}
    numbers = {"attempts": len(lines), "checked": min(len(lines), _MOST_CHECKED), "checks": counts}
    if failed:
        numbers = {**numbers, "failed": [dataclasses.asdict(one) for one in failed[:10]]}
        return Finding(what, Verdict.FAIL, f"{failed[0].what}: {failed[0].said}", numbers)
    said = f"the transcripts of {numbers['checked']} attempts fit together; without a roster no signature is checked"
    said = f"{said} ({about})" if about else said
    return Finding(what, Verdict.PASS, said, numbers)
