"""Whether clients are sampled as the accountant was told, in the run and in many more draws of the same sampling."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fedml_core.privacy.goodness import SizeTest, binomial_sizes, even_p, overlap_p
from fedml_core.randomness import key_bytes
from server.sampling import Sampling
from simulations.audit.findings import REJECT, Finding, Verdict

__all__ = ["check_sampling", "judge_poisson", "rate_of"]

_DRAWS = 400
_ENOUGH = 10  # rounds of the run itself, for their sizes to be judged


def rate_of(sampling: Sampling, population: int) -> float:
    """Return the probability with which a client is in a round, as the sampling's own event has it; else 1."""
    event = sampling.event(population, {})
    if event.get("name") == "poisson":
        return float(event["sampling_probability"])
    return float(event["sample"]) / population if event.get("name") == "fixed-size" else 1.0


def check_sampling(
    sampling: Sampling, population: int, observed: Sequence[int], seed: int
) -> tuple[Finding, SizeTest | None]:
    """Return whether cohorts are those of the scheme that is claimed, and the histogram of their sizes.

    They are drawn as a private run draws them, by a secret.

    Args: observed: the cohort sizes of the run.
    """
    what = "sampling"
    event = sampling.event(population, {})
    name = str(event.get("name", "none"))
    if name not in ("poisson", "fixed-size"):
        return Finding(what, Verdict.INFO, "no sampling is claimed, so none amplifies"), None
    secret = key_bytes(seed, "audited cohorts", size=32)
    cohorts = [sampling.hidden_cohort(range(population), number, secret) for number in range(1, _DRAWS + 1)]
    flaw = _malformed(cohorts, population)
    if flaw:
        return Finding(what, Verdict.FAIL, flaw, {"claimed": name}), None
    return (
        judge_poisson(what, cohorts, population, float(event["sampling_probability"]), observed=observed)
        if name == "poisson"
        else (
            _fixed(cohorts, observed, population, int(event["sample"])),
            None,
        )
    )


def _malformed(cohorts: Sequence[Sequence[int]], population: int) -> str:
    for cohort in cohorts:
        if len(set(cohort)) != len(cohort):
            return "a cohort holds a client twice"
        if cohort and not 0 <= min(cohort) <= max(cohort) < population:
            return "a cohort holds a client that could not be asked"
    return ""


def judge_poisson(
    what: str,
    draws: Sequence[Sequence[int]],
    population: int,
    rate: float,
    *,
    observed: Sequence[int] = (),
    who: tuple[str, str] = ("cohort", "clients"),
    more: Mapping[str, float] | None = None,
) -> tuple[Finding, SizeTest]:
    """Return whether draws are those of Poisson sampling, and the histogram of their sizes.

    Args: observed: further sizes. who: what a draw and what its members are called. more: further p-values.
    """
    draw, members = who
    sizes = binomial_sizes([len(one) for one in draws], population, rate)
    overlaps = [len(set(a) & set(b)) for a, b in itertools.pairwise(draws)]
    run = binomial_sizes(observed, population, rate) if len(observed) >= _ENOUGH else None
    parts = {
        "sizes": sizes.p_value,
        "overlaps": overlap_p(overlaps, population, rate),
        "members": _even(draws, population, rate),
        **({} if run is None else {"run_sizes": run.p_value}),
        **(more or {}),
    }
    p_value = min(1.0, len(parts) * min(parts.values()))
    numbers = {"claimed": "poisson", "rate": rate, "p_value": p_value, "p_values": parts, "sizes": asdict(sizes)}
    if p_value < REJECT:
        worst = {
            "sizes": f"{draw} sizes are not Binomial",
            "run_sizes": f"the run's {draw} sizes are not Binomial",
            "overlaps": f"each {draw} and the next share too few or too many {members}",
            "members": f"some {members} come more often than others, or all come alike",
            "dealt": f"within a training {members} come as if they were dealt out in turn",
        }[min(parts, key=lambda name: parts[name])]
        said = f"Poisson sampling is claimed, and {worst} (p = {p_value:.2g})"
        return Finding(what, Verdict.FAIL, said, numbers), sizes
    said = f"each {draw} is a draw of Poisson sampling at rate {rate:g} (p = {p_value:.2g})"
    return Finding(what, Verdict.PASS, said, numbers), sizes


def _fixed(cohorts: Sequence[Sequence[int]], observed: Sequence[int], population: int, size: int) -> Finding:
    wrong = [len(cohort) for cohort in cohorts if len(cohort) != size] + [one for one in observed if one != size]
    p_value = 0.0 if wrong else _even(cohorts, population, size / population)
    numbers = {"claimed": "fixed-size", "size": size, "p_value": p_value}
    if wrong:
        said = f"cohorts of {size} are claimed, and one has {wrong[0]}"
        return Finding("sampling", Verdict.FAIL, said, numbers)
    if p_value < REJECT:
        said = f"cohorts of {size} are claimed to be uniform, and some clients come more often (p = {p_value:.2g})"
        return Finding("sampling", Verdict.FAIL, said, numbers)
    return Finding("sampling", Verdict.PASS, f"cohorts are uniform, of {size} each (p = {p_value:.2g})", numbers)


def _even(cohorts: Sequence[Sequence[int]], population: int, rate: float) -> float:
    """Return the p-value of how often each client came."""
    if population < 2 or rate >= 1:
        return 1.0
    came = np.bincount(np.concatenate([np.asarray(cohort, dtype=np.int64) for cohort in cohorts]), minlength=population)
    return even_p(came, len(cohorts), rate)
