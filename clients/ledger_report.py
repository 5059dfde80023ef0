"""What `fedveil ledger` says: what was spent, by run and in all, always with unit, adjacency, delta and sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.ledger import LEDGER_FILE, ledger_of
from fedml_core.checks import require_number
from fedml_core.config import SiteConfig, load_site
from fedml_core.console import Console
from fedml_core.errors import ConfigError, PrivacyError
from fedml_core.privacy.ledger import Account, Entry, Ledger

__all__ = ["Found", "find", "say_export", "say_spent", "say_verified"]

_DELTA = 1e-5


@dataclass(frozen=True)
class Found:
    """A ledger, and the site.toml that named it, if one did."""

    ledger: Ledger
    site: SiteConfig | None = None


def find(where: Path, head: Path | None = None) -> Found:
    """Return the ledger that a site.toml names, or a folder or file holds. `head`: where it is, if not beside it.

    Raises: ConfigError: if the site.toml is faulty.
    """
    if where.suffix == ".toml" or (where / "site.toml").is_file():
        config = load_site(where)
        ledger = ledger_of(config)
        return Found(ledger if head is None else Ledger(ledger.path, head=head), config)
    return Found(Ledger(where / LEDGER_FILE if where.is_dir() else where, head=head))


def say_spent(console: Console, found: Found, delta: float | None) -> None:
    """Say what was spent. `delta`: at which; by default the site.toml's.

    Raises: CheckpointError: if the ledger is missing or cannot be believed. ConfigError: for a delta outside (0, 1).
    """
    last = found.ledger.verify()
    entries = found.ledger.entries()
    chosen = delta if delta is not None else _DELTA if found.site is None else found.site.budget.delta
    require_number("delta", chosen, above=0, below=1)
    accounts = [_account(found, account, entries, chosen) for account in _accounts(entries)]
    console.table([("ledger", str(found.ledger.path)), ("entries", f"{last.number}, hash {last.digest}")])
    for account in accounts:
        console.say(f"{account['dataset']} (unit {account['unit']}, {account['adjacency']}, delta {chosen:g})")
        console.table(
            [("  in all", account["claim"]), *((f"  run {run['run'][:12]}", run["claim"]) for run in account["runs"])]
        )
        for name, left in account["budget"].items():
            console.say(f"  {name} {left:g} is the most that this site allows")
    console.result(
        {"ledger": str(found.ledger.path), "entries": last.number, "hash": last.digest, "accounts": accounts}
    )


def say_verified(console: Console, found: Found, noted: str | None) -> None:
    """Check every hash, and say how far the ledger goes. `noted`: a hash that it had at some time.

    Raises: CheckpointError: it names the first entry that is wrong.
    """
    if noted is not None and (len(noted) != 64 or not set(noted) <= set("0123456789abcdef")):
        raise ConfigError(f"a noted hash must be 64 hex digits, got {noted[:80]!r}; fedveil ledger show prints them")
    last = found.ledger.verify(noted)
    console.say(f"{found.ledger.path}: all {last.number} entries are as they were written, up to the head")
    console.say(f"note this down, away from this machine: {last.digest}")
    console.result({"ledger": str(found.ledger.path), "entries": last.number, "hash": last.digest, "intact": True})


def say_export(console: Console, found: Found, out: Path | None) -> None:
    """Write the entries as JSON lines, to `out` or for people to read.

    Raises: CheckpointError: if the ledger is missing or cannot be believed. ConfigError: if `out` exists.
    """
    lines = found.ledger.lines()
    if out is None:
        for line in lines:
            console.say(line)
    else:
        try:
            with out.open("x", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
        except FileExistsError:
            raise ConfigError(f"{out} exists already and is not overwritten; move it away first") from None
        console.say(f"{len(lines) - 1} entries are in {out}")
    console.result({"entries": len(lines) - 1, "out": None if out is None else str(out)})


def _account(found: Found, account: Account, entries: Sequence[Entry], delta: float) -> dict[str, Any]:
    runs = []
    for run in dict.fromkeys(entry.run for entry in entries if entry.dataset == account.dataset):
        mine = [entry for entry in entries if entry.run == run and entry.dataset == account.dataset]
        servers = sorted({entry.server for entry in mine})
        runs.append({"run": run, "servers": servers, "releases": len(mine), **_spent(found, account, delta, run)})
    table = None if found.site is None else found.site.budget
    limits = {} if table is None or table.unit != account.unit else table.model_dump()
    budget = {name: limit for name, limit in limits.items() if name.startswith("epsilon") and limit is not None}
    return {**vars(account), **_spent(found, account, delta, None), "budget": budget, "runs": runs}


def _spent(found: Found, account: Account, delta: float, run: str | None) -> dict[str, Any]:
    try:
        claim = found.ledger.spent(account, delta, run=run)
    except PrivacyError as error:
        return {"epsilon": None, "delta": delta, "claim": f"cannot be accounted for: {error}"}
    said = " ".join([str(claim) if claim.epsilon < float("inf") else "unbounded:", *claim.notes])
    return {**claim.to_json(), "claim": said}


def _accounts(entries: Sequence[Entry]) -> Iterator[Account]:
    """Yield every account that has an event, and one for data that were only ever released without noise."""
    seen = dict.fromkeys(_account_of(entry) for entry in entries if entry.event is not None)
    bare = dict.fromkeys(_account_of(entry) for entry in entries if entry.event is None)
    protected = {account.dataset for account in seen}
    yield from seen
    yield from (account for account in bare if account.dataset not in protected)


def _account_of(entry: Entry) -> Account:
    return Account(entry.dataset, entry.unit, entry.adjacency)
