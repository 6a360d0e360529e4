"""Renders the rows of a coverage run as docs/coverage.md."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
import zoo
from compare import SCENARIOS, TOLERANCE, is_extra

__all__ = ["render", "summary", "surroundings"]

Row = dict[str, Any]
# The scenarios that stand for a prompt: their sites are the table's.
_PREFILL = ("batch1", "ones")
_BAD = ("crash", "mismatch", "timeout")
_SHORT = {"stock_fails": "STOCK_FAILS", "same": "same"}


class _Model:
    """All rows of one model."""

    def __init__(self, name: str, rows: dict[str, Row]) -> None:
        self.name, self.rows = name, rows
        prefill = [rows[s] for s in _PREFILL if s in rows]
        self.valid = [row for row in prefill if row["state"] != "stock_fails"]
        fullest = max(self.valid, key=lambda row: len(row["sites"]), default=None)
        self.sites: list[dict[str, str]] = fullest["sites"] if fullest else []
        self.missed = max((row["missed"] for row in self.valid), default=0)

    @property
    def rewritten(self) -> int:
        """The least over the prefill scenarios that the stock model passes."""
        counts = [sum(s["decision"] == "rewritten" for s in row["sites"]) for row in self.valid]
        return min(counts, default=0)

    @property
    def attends(self) -> bool:
        return bool(self.sites or self.missed)

    @property
    def complete(self) -> bool:
        """Each prefill scenario that stock passes is right, with every site found and rewritten."""
        return (
            bool(self.valid)
            and self.attends
            and not self.missed
            and all(row["state"] == "ok" for row in self.valid)
            and all(s["decision"] == "rewritten" for row in self.valid for s in row["sites"])
        )

    @property
    def declined(self) -> Counter[tuple[str, str]]:
        """(code, reason) -> how often, the worst of the prefill scenarios for each."""
        total: Counter[tuple[str, str]] = Counter()
        for row in self.valid:
            total |= Counter(
                (s["code"], _plain(s["reason"]))
                for s in row["sites"]
                if s["decision"] != "rewritten"
            )
        return total

    @property
    def mask_left(self) -> list[str]:
        return [text for row in self.rows.values() for text in row["mask_left"] or ()]

    def cell(self, scenario: str) -> str:
        row = self.rows.get(scenario)
        if row is None:
            return ""
        if row["state"] in _SHORT:
            return _SHORT[row["state"]]
        if row["state"] in ("crash", "timeout"):
            return f"**{row['state']}**"
        text = "other shape" if row["difference"] is None else f"{row['difference']:.0e}"
        text = "0" if row["difference"] == 0 else text
        if row["state"] == "mismatch":
            return f"**{text}**"
        prompts = [site for site in row["sites"] if site["code"] != "DECODE"]
        done = sum(site["decision"] == "rewritten" for site in prompts)
        return f"{text} ({done}/{len(prompts)})" if done < len(prompts) else text


def summary(rows: list[Row]) -> list[str]:
    """The totals of the causal language models, one line each."""
    models = _models(rows, lambda name: not is_extra(name))
    kept = [row for model in models for row in model.rows.values()]
    states = Counter(row["state"] for row in kept)
    attending = [m for m in models if m.attends]
    return [
        f"{len(models)} architectures, {len(kept)} rows: {_counts(states)}",
        f"{len(attending)} architectures have softmax attention; "
        f"{sum(m.complete for m in models)} have all prefill sites rewritten",
        f"{sum(len(m.sites) for m in models)} prefill sites, "
        f"{sum(m.rewritten for m in models)} rewritten, "
        f"{sum(m.missed for m in models)} softmaxes over keys that are no site",
        f"{sum(states[s] for s in _BAD)} rows that stock passes and ours does not",
        f"{sum(bool(m.mask_left) for m in models)} architectures with a mask [Lq, Lk] left in a "
        "graph whose sites were all rewritten",
    ]


def render(rows: list[Row]) -> str:
    """The page."""
    versions = sorted({row.get("version", "") for row in rows})
    lines = [
        "# Coverage",
        "",
        "Written by `make coverage`. Each architecture is built from a shrunken configuration with "
        'random weights and runs twice: compiled unmodified (`backend="eager"`) and rewritten '
        '(`backend="minference"`, `budget=1.0`, `min_tokens=0`, `inner="eager"`). A cell is the '
        "largest difference of the logits over max(1, largest logit); above "
        f"{TOLERANCE:g} it is bold and counts as a mismatch. STOCK_FAILS: the unmodified model "
        "fails, or differs from itself, or is not finite; it counts for neither side. `same`: the "
        "model has no other attention implementation. Sites are those of the scenarios without "
        "padding (`batch1`, `ones`); `generate` compares 8 greedy tokens and the logits before "
        "each; `inductor` compiles both sides with Inductor. A cell 0 (1/2) "
        "says that one of two sites was rewritten. Missed: softmaxes over keys and attention calls "
        "in the stock graphs that are no site. Mask left: tensors [..., Lq, Lk] in graphs whose "
        "sites were all rewritten.",
        "",
        f"{_where(rows)}; `python tests/models/run_coverage.py --write docs/coverage.md`; "
        f"{sum(row['seconds'] for row in rows) / 3600:.1f} hours of one core"
        + (f"; rows of {len(versions)} states of the sources" if len(versions) > 1 else ""),
        "",
        "## Causal language models",
        "",
        *(f"- {line}" for line in summary(rows)),
        *(f"- not built: `{name}`, {why}" for name, why in zoo.UNBUILDABLE.items()),
        "",
        *_table(_models(rows, lambda name: not is_extra(name))),
        "",
        "## Other models",
        "",
        *_table(_models(rows, is_extra)),
        *_details(rows),
    ]
    return "\n".join(lines) + "\n"


def surroundings() -> str:
    """Where a row is made."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()} CPU"
    )


def _where(rows: list[Row]) -> str:
    """The surroundings of all rows, with their numbers where there are several."""
    found = Counter(row.get("where", "not recorded") for row in rows).most_common()
    if len(found) == 1:
        return found[0][0]
    return "; ".join(f"{where} ({count} rows)" for where, count in found)


def _models(rows: list[Row], keep: Callable[[str], bool]) -> list[_Model]:
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        if keep(row["name"]):
            grouped.setdefault(row["name"], {})[row["scenario"]] = row
    return [_Model(name, grouped[name]) for name in sorted(grouped)]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {_SHORT.get(key, key)}" for key, count in counts.most_common())


def _table(models: list[_Model]) -> list[str]:
    used = [s for s in SCENARIOS if any(s in m.rows for m in models)]
    head = ["architecture", "sites", "rewritten", "declined", "missed", "mask left", *used]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model in models:
        codes: Counter[str] = Counter()
        for (code, _), count in model.declined.items():
            codes[code] += count
        cells = [
            model.name,
            str(len(model.sites)),
            str(model.rewritten),
            ", ".join(f"{count} {code}" for code, count in codes.items()),
            str(model.missed or ""),
            str(len(model.mask_left) or ""),
            *(model.cell(s) for s in used),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _details(rows: list[Row]) -> list[str]:
    """Reasons of declined sites, rows that failed, why stock failed, tensors left."""
    models = _models(rows, lambda _: True)
    reasons: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for key in model.declined:
            reasons.setdefault(key, []).append(model.name)
    lines = ["", "## Declined, with reasons", "", "| code | reason | models |", "|---|---|---|"]
    for (code, reason), names in sorted(reasons.items()):
        lines.append(f"| {code} | {_escape(reason)} | {', '.join(names)} |")
    for title, states in (
        ("Rows that stock passes and ours does not", _BAD),
        ("STOCK_FAILS, with reasons", ("stock_fails",)),
    ):
        chosen = [row for m in models for row in m.rows.values() if row["state"] in states]
        lines += ["", f"## {title}", ""]
        lines += _grouped_errors(chosen) if chosen else ["None."]
    left = [
        f"- {m.name}: {_escape(m.mask_left[0])} ({len(m.mask_left)})" for m in models if m.mask_left
    ]
    lines += ["", "## Tensors [Lq, Lk] left in graphs whose sites were all rewritten", ""]
    return lines + (left or ["None."])


def _grouped_errors(rows: list[Row]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        text = row["error"] or f"difference {row['difference']}"
        groups.setdefault((row["name"], text), []).append(row["scenario"])
    return [f"- {name} ({', '.join(s)}): {_escape(text)}" for (name, text), s in groups.items()]


def _plain(reason: str) -> str:
    """A reason without addresses and numbers of nodes, so that alike ones come together."""
    reason = re.sub(r"<built-in \w+ (?:\w+ )?(\w+) of [^>]*>", r"\1", reason)
    return re.sub(r"\b([a-z]\w*?)_\d+\b", r"\1", reason)


def _escape(text: str) -> str:
    """Text that neither breaks a table nor names a directory."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
