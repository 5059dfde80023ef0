"""What an audit leaves for people and scripts: audit.json, audit.html on one page, and rows for a terminal."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml_core.storage import write_atomically
from fedml_core.strict_json import json_value
from simulations.audit.audit import Audited
from simulations.audit.findings import Verdict

__all__ = ["JSON", "PAGE", "rows_of", "write_audit"]

JSON, PAGE = "audit.json", "audit.html"

_COLORS = {Verdict.PASS: "#009E73", Verdict.WARN: "#E69F00", Verdict.FAIL: "#D55E00", Verdict.INFO: "#666666"}
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "td{padding:.25rem .9rem .25rem 0;vertical-align:top}b.v{color:#fff;padding:.1rem .5rem;border-radius:.3rem}"
    "img{width:100%}"
)


def write_audit(audited: Audited, folder: Path, *, pictures: bool = True) -> Path:
    """Write audit.json and audit.html into the folder, and return the page's path."""
    text = json.dumps(json_value(audited.to_json()), indent=1)
    write_atomically(folder / JSON, text.encode())
    picture = b""
    if pictures:
        from simulations.audit.pictures import page_of_pictures  # loads Matplotlib

        picture = page_of_pictures(audited)
    write_atomically(folder / PAGE, _page(audited, picture).encode())
    return folder / PAGE


def rows_of(audited: Audited) -> list[tuple[str, str]]:
    """Return the audit as rows of a name and what it is."""
    rows = [("protection", audited.protection), *_claims(audited)]
    rows += [(finding.what, f"{finding.verdict}: {finding.said}") for finding in audited.findings]
    return [*rows, ("verdict", str(audited.verdict))]


def _claims(audited: Audited) -> list[tuple[str, str]]:
    """Return what is claimed of clients and of examples, or that nothing is."""
    named = [("claim", audited.claim), ("claim on examples", audited.example_claim)]
    rounds, every = audited.facts["rounds"], audited.facts["rounds_of_the_run"]
    after = f", after the {rounds} of {every} rounds that were attacked" if rounds < every else ""
    return [(name, _claim(claim) + after) for name, claim in named if claim is not None] or [("claim", _claim(None))]


def _claim(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return "no differential privacy"
    about = (
        f"unit {claim['unit']}, {claim['adjacency']}, sampling {claim['sampling']}, accountant {claim['accountant']}"
    )
    return f"epsilon {claim['epsilon']:.4g} at delta {claim['delta']:g} ({about})"


def _page(audited: Audited, picture: bytes) -> str:
    mark = f'<b class="v" style="background:{_COLORS[audited.verdict]}">{audited.verdict}</b>'
    claims = "<br>".join(f"{name.capitalize()}: {html.escape(claim)}" for name, claim in _claims(audited))
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Privacy audit</title>',
        f"<style>{_STYLE}</style></head><body><h1>Privacy audit {mark}</h1>",
        f"<p>Protection: {html.escape(audited.protection)}<br>{claims}</p><table>",
    ]
    for finding in audited.findings:
        mark = f'<b class="v" style="background:{_COLORS[finding.verdict]}">{finding.verdict}</b>'
        lines.append(
            f"<tr><td>{html.escape(finding.what)}</td><td>{mark}</td><td>{html.escape(finding.said)}</td></tr>"
        )
    lines.append("</table>")
    if picture:
        data = base64.b64encode(picture).decode()
        lines.append(f'<img alt="what was measured" src="data:image/png;base64,{data}">')
    lines += ["<table>", *_facts(audited), "</table></body></html>"]
    return "\n".join(lines) + "\n"


def _facts(audited: Audited) -> Sequence[str]:
    named = (
        "rounds",
        "rounds_of_the_run",
        "clients",
        "canaries",
        "canaries_included",
        "parameters",
        "most_participations",
    )
    return [
        f"<tr><td>{name.replace('_', ' ')}</td><td>{html.escape(str(audited.facts[name]))}</td></tr>" for name in named
    ]
