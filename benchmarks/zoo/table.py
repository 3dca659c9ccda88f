"""What the results say, as Markdown."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.zoo import tiny
from benchmarks.zoo.examine import TOLERANCE

Line = dict[str, Any]

APART = {"weights-used": "weights or log-sum-exp used elsewhere", "one-key": "a single key"}
"""Attentions that no kernel can take over, by the code of the reason that keeps them."""
UNDERSTOOD = ("data-sizes",)
"""Reasons that keep an attention after it was brought into the normal form."""


def captures(lines: Iterable[Line]) -> list[tuple[Line, str, Line]]:
    """Every line with each of its captures that worked."""
    return [(line, p, c) for line in lines for p, c in line.get("captures", {}).items() if "failed" not in c]


def wrong(capture: Line) -> dict[str, float]:
    """The paddings with a wrong output, and its error: more than the tolerance, and than other roundings make."""
    rounding = capture.get("rounding", {})
    return {p: e for p, e in capture.get("error", {}).items() if not e <= max(TOLERANCE, 3 * rounding.get(p, 0.0))}


def differing(capture: Line) -> dict[str, float]:
    """The paddings with which the captured graph is not the model, before anything was rewritten, and by how much."""
    return {p: e for p, e in capture.get("capture error", {}).items() if not e <= TOLERANCE}


def used(capture: Line) -> int:
    """Attentions counted whose result is read, and that are in a graph at all."""
    return int(capture["counted"] - capture.get("unused", 0) - capture.get("outside", 0))


def verdict(capture: Line) -> str:
    """What is not as it should be, in words."""
    said = [f"WRONG {p} {e:.0e}" for p, e in wrong(capture).items()]
    said += [f"captured as another function, {p} {e:.0e}" for p, e in differing(capture).items()]
    said += [f"the model itself gives NaN, {p}" for p in capture.get("nan", ())]
    said += [
        f"ill-conditioned, {p}: error {capture['error'][p]:.0e}, and {moved:.0e} by the weights' last bits"
        for p, moved in capture.get("rounding", {}).items()
        if p not in wrong(capture)
    ]
    said += [f"torch.compile leaves {capture['outside']} to Python"] if capture.get("outside") else []
    if len(capture["sites"]) != used(capture):
        said.append(f"{used(capture)} counted, {len(capture['sites'])} found")
    said += [f"{len(names)} softmaxes not in the report" for names in [capture.get("unexplained")] if names]
    kept = Counter(re.sub(r"\b([a-z_]+?)_\d+\b", r"\1", s["reason"]) for s in capture["sites"] if not s["replaced"])
    return "; ".join([*said, *(f"{times} kept: {reason}" for reason, times in kept.items())])


def shares(lines: Iterable[Line]) -> dict[str, float]:
    """Counts over all captures."""
    worked = [c for _, _, c in captures(lines)]
    sites = [s for c in worked for s in c["sites"]]
    listed = sum(s["code"] in APART for s in sites)
    counted = sum(map(used, worked))
    missing = sum(max(0, used(c) - len(c["sites"])) for c in worked)
    puzzling = [sum(not s["understood"] and s["code"] not in (*APART, *UNDERSTOOD) for s in c["sites"]) for c in worked]
    surplus = [max(0, len(c["sites"]) - used(c)) for c in worked]  # look-alikes, kept and explained
    return {
        "counted": counted,
        "explained": counted - missing - sum(len(c.get("unexplained", ())) for c in worked),
        "found": counted - missing - sum(max(0, n - more) for n, more in zip(puzzling, surplus, strict=True)),
        "apart": listed,
        "replaced": sum(s["replaced"] for s in sites),
        "wrong": sum(bool(wrong(c)) for c in worked),
    }


def summary(lines: list[Line]) -> str:
    """The numbers that matter, over all lines."""
    n = shares(lines)
    worked = [c for _, _, c in captures(lines)]
    failed = Counter(line["failed"].split(":")[0] for line in lines if "failed" in line)
    unseen = sum("failed" in c for line in lines for c in line.get("captures", {}).values())
    timed = [c["seconds"] for c in worked if "seconds" in c]
    cost = {k: sum(seconds[k] for seconds in timed) for k in ("capture", "pass")}
    ratios = sorted(seconds["pass"] / seconds["capture"] for seconds in timed)
    blind = sum(len(c.get("blind", ())) for c in worked)

    listed = Counter(APART[s["code"]] for c in worked for s in c["sites"] if s["code"] in APART)

    def share(part: float, of: float) -> str:
        return f"{part:.0f} of {of:.0f} ({part / max(of, 1):.2%})"

    rows = {
        "architectures measured": f"{len({line['model'] for line in lines})} of {len(tiny.architectures())}",
        "... with each implementation": len(lines),
        **{f"... {reason}": number for reason, number in failed.items()},
        "captures as one graph": len(timed),
        "... in several graphs, by torch.compile": len(worked) - len(timed),
        "... that failed": unseen,
        "attentions that torch.compile leaves to Python": sum(c.get("outside", 0) for c in worked),
        "attentions counted while the models run": n["counted"],
        "softmaxes counted in the graphs": sum(c.get("softmaxes", 0) for c in worked),
        "explained in the report": share(n["explained"], n["counted"]),
        "found and understood": share(n["found"], n["counted"]),
        "listed apart": f"{n['apart']} ({', '.join(f'{k} {v}' for k, v in listed.items())})",
        "proven and replaced, of the others": share(n["replaced"], n["counted"] - n["apart"]),
        "graphs with a wrong output": n["wrong"],
        "captures that are not the model, before the rewrite": sum(bool(differing(c)) for c in worked),
        "replaced attentions whose mask the inputs do not test": blind,
        "seconds of capture, pass": ", ".join(f"{v:.0f}" for v in cost.values()),
        "pass / capture: median, 95 %, largest": ", ".join(
            f"{ratios[int(q * (len(ratios) - 1))]:.2f}" for q in (0.5, 0.95, 1.0) if ratios
        ),
    }
    head = f"**{tiny.version()}**\n\n| | |\n|---|---|"
    return "\n".join([head, *(f"| {name} | {value} |" for name, value in rows.items())])


def table(lines: list[Line]) -> str:
    """The summary, and a line for each capture at which something is left."""
    left: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        said = {p: c["failed"] if "failed" in c else verdict(c) for p, c in line.get("captures", {}).items()}
        for what in dict.fromkeys([line.get("failed", ""), *said.values()]):
            if what:
                what = re.sub(r"'/\S*", "'...", what)  # no paths of this machine
                left.setdefault((line["model"], what), []).append(line["attention"])
    rows = [f"| {model} | {', '.join(dict.fromkeys(how))} | {what} |" for (model, what), how in left.items()]
    return "\n".join([summary(lines), "", "| model | attention | what is left |\n|---|---|---|", *rows, ""])
