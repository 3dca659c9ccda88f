"""One architecture: counted, captured, rewritten and compared, in a process of its own."""

from __future__ import annotations

import gc
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from benchmarks.softmaxes import softmaxes, unexplained
from benchmarks.zoo import tiny
from benchmarks.zoo.count import count, count_in_graphs
from neuron_attn_rewrite import CaptureError, RewriteConfig, RewrittenModule
from neuron_attn_rewrite.backends.compile import backend, collect_reports
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.report.data import SiteReport
from neuron_attn_rewrite.rewriter import rewrite_graph

SECONDS, MEMORY = 120, 4 * 2**30
"""The limits of one architecture."""
TOLERANCE = 1e-3
"""Largest accepted error of a whole model in float32, relative to the largest magnitude of each output. A deep model
with random weights makes a hundred of one rounding; a mask that is missing makes more (see `blind`)."""
CAPTURES = {"none": ("none",), "ones": ("ones", "right", "left")}
"""The padding with which a graph is captured, and those with which it is called."""

Call = Mapping[str, Tensor]
Outputs = list[Tensor]


def outputs(run: Callable[..., Any], call: Call) -> Outputs:
    """All floating-point outputs of one call, those of a sequence at the positions that are not padding."""
    torch.manual_seed(3)
    with torch.no_grad():
        result = run(**{name: t.clone() for name, t in call.items()})
    masks = [call[name] for name in ("decoder_attention_mask", "attention_mask") if name in call]
    found = []
    for t in pytree.tree_leaves(result):
        if isinstance(t, Tensor) and t.is_floating_point():
            mask = next((m for m in masks if t.shape[:2] == m.shape), None)
            found.append(t if mask is None else t[mask.bool()])
    return found


def difference(new: Outputs, old: Outputs) -> float:
    """The largest over all outputs, each relative to its largest finite magnitude. NaN in `old` asks nothing."""
    return max((_difference(a, b) for a, b in zip(new, old, strict=True)), default=0.0)


def _difference(new: Tensor, old: Tensor) -> float:
    if new.shape != old.shape:
        return torch.inf
    new, old = new[~old.isnan()], old[~old.isnan()]
    finite = old.isfinite()
    if not torch.equal(new[~finite], old[~finite]):
        return torch.inf
    new, old = new[finite].double(), old[finite].double()
    worst = float((new - old).abs().max() / old.abs().max().clamp_min(1e-12)) if old.numel() else 0.0
    return worst if worst == worst else torch.inf


def examine(model_type: str, implementation: str, quick: bool) -> dict[str, Any]:
    """One line of the results. What can't be built says so under "failed"."""
    line: dict[str, Any] = {"model": model_type, "attention": implementation}
    try:
        model, inputs = tiny.ready(model_type, implementation)
    except tiny.NotBuilt as error:
        return {**line, "failed": f"not built: {error}"}
    if not count(model, inputs):
        return {**line, "failed": "no attention"}
    calls = {"none": inputs, **tiny.paddings(model, inputs)}
    line["captures"] = {
        padding: examine_capture(model, {p: calls[p] for p in called if p in calls})
        for padding, called in CAPTURES.items()
        if padding in calls and not (quick and padding == "none" and "ones" in calls)
    }
    return line


def examine_capture(model: nn.Module, calls: Mapping[str, Call]) -> dict[str, Any]:
    """Capture with the first of the calls, rewrite, and run the result with all of them."""
    example = next(iter(calls.values()))
    old = {padding: outputs(model, call) for padding, call in calls.items()}
    repeats = difference(outputs(model, example), next(iter(old.values()))) == 0
    result: dict[str, Any] = {"counted": count(model, example)}
    result["nan"] = [padding for padding, found in old.items() if any(bool(t.isnan().any()) for t in found)]
    gc.collect()
    gc.freeze()  # a collection that walks through all of transformers would fall into one of the two times
    start = time.process_time()
    try:
        captured = capture(model, (), example)
    except CaptureError as error:
        why = short(error.__cause__ or error)
        try:
            return result | examine_graphs(model, calls, old) | {"broken": why}
        except Exception as second:
            return {**result, "failed": f"not captured: {why}; by torch.compile: {short(second)}"}
    seconds = {"capture": time.process_time() - start}
    example = {name: example[name] for name in captured.module.graph._codegen.pytree_info.orig_args}  # type: ignore[attr-defined]
    ordered = {padding: {name: call[name] for name in example} for padding, call in calls.items()}
    native = {padding: outputs(captured.module, call) for padding, call in ordered.items()}
    # Attentions whose result nobody reads are gone from the graph before anything is looked for.
    result["unused"] = result["counted"] - count(captured.module, example)
    names = [node.name for node in softmaxes(captured.module.graph)]

    start = time.process_time()
    # Not verified: a wrong kernel is to show, and not to be put back.
    report = rewrite_graph(captured.module, None, RewriteConfig(policy="always"))
    rewritten = RewrittenModule.wrap(captured.module, report)
    seconds["pass"] = time.process_time() - start
    result |= {
        "nodes": report.nodes_before,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "sites": [site_line(site) for site in report.sites],
        "softmaxes": len(names),
        "unexplained": unexplained(names, report),
        "capture error": {p: difference(native[p], old[p]) for p in calls},
    }
    if not repeats:
        return {**result, "random": True}
    new = {padding: outputs(rewritten, call) for padding, call in ordered.items()}
    result["error"] = {p: difference(new[p], native[p]) for p in calls}
    far = [p for p, error in result["error"].items() if not error <= TOLERANCE]
    result["rounding"] = {p: rounding(rewritten, ordered[p]) for p in far}
    result["blind"] = blind(rewritten, next((ordered[p] for p in ("right",) if p in calls), example))
    return result


def rounding(module: nn.Module, call: Call) -> float:
    """How far the outputs move when every weight is rounded anew, by one unit in its last place up or down."""
    before = outputs(module, call)
    weights = [p for p in module.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in weights]
    torch.manual_seed(4)
    with torch.no_grad():
        for p in weights:
            p.copy_(torch.nextafter(p, torch.where(torch.rand_like(p) < 0.5, -torch.inf, torch.inf).to(p.dtype)))
        moved = outputs(module, call)
        for p, value in zip(weights, saved, strict=True):
            p.copy_(value)
    return difference(moved, before)


def examine_graphs(model: nn.Module, calls: Mapping[str, Call], old: Mapping[str, Outputs]) -> dict[str, Any]:
    """The same for a model that torch.compile breaks into several graphs."""
    example = next(iter(calls.values()))
    outside = count(model, example) - count_in_graphs(model, example)
    torch.compiler.reset()
    options = {"inner": "eager", "policy": "always", "verify": False}
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options)
    with collect_reports() as collected:
        new = {next(iter(calls)): outputs(compiled, example)}
        graphs = list(collected.graphs)
        # One graph may serve several layers: each of its calls counts.
        sites = [site_line(site) for graph in graphs for _ in range(graph.calls) for site in graph.report.sites]
    new |= {padding: outputs(compiled, call) for padding, call in calls.items() if padding not in new}
    return {
        "graphs": len(graphs),
        "outside": outside,
        "nodes": sum(graph.report.nodes_before for graph in graphs),
        "sites": sites,
        "error": {p: difference(new[p], old[p]) for p in calls},
    }


def site_line(site: SiteReport) -> dict[str, Any]:
    """What is kept of one attention."""
    reason = None if site.is_replaced else site.reasons[-1]
    return {
        "name": site.name,
        "pattern": site.pattern,
        "understood": site.q_len is not None,
        "replaced": site.is_replaced,
        "mask": f"{site.mask}{' + bias' if site.bias else ''}",
        "reason": reason or "",
        "code": reason.code if reason else "",
    }


MOST_BLINDED = 12
MASKS = ("band_lower", "band_upper", "key_padding", "bounds", "bias")


def blind(rewritten: fx.GraphModule, call: Call) -> list[str]:
    """Kernel calls whose masks could be dropped without this call showing it."""
    right = outputs(rewritten, call)
    found = []
    calls = rewritten.graph.find_nodes(op="call_function", target=torch.ops.neuron_attn.flash_fwd.default)
    for node in list(calls)[:MOST_BLINDED]:
        given = node.kwargs
        node.kwargs = {name: value for name, value in given.items() if name not in MASKS}
        if node.kwargs != given:
            rewritten.recompile()
            if difference(outputs(rewritten, call), right) <= 10 * TOLERANCE:
                found.append(node.name)
        node.kwargs = given
    rewritten.recompile()
    return found


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# A process for each


def _child(model_type: str, known: frozenset[str], quick: bool, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    todo = [how for how in tiny.supports(model_type) if how not in known]
    pipe.send(todo)
    for implementation in todo:
        try:
            pipe.send(examine(model_type, implementation, quick))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(f"error: {short(error)} at {Path(where.filename).name}:{where.lineno}")


def examine_apart(model_type: str, known: frozenset[str], quick: bool) -> list[dict[str, Any]]:
    """`examine` with each implementation not yet known, in a process of its own with limits of time and memory."""
    here, there = Pipe(duplex=False)
    process = get_context("fork").Process(target=_child, args=(model_type, known, quick, there))
    process.daemon = True
    process.start()
    there.close()
    lines: list[dict[str, Any]] = []
    todo: list[str] = []
    try:
        todo = here.recv()
        for _ in todo:
            lines.append(here.recv() if here.poll(SECONDS) else f"error: more than {SECONDS} s")
            if not isinstance(lines[-1], dict) and "more than" in lines[-1]:
                break
    except EOFError:
        lines.append(f"error: the process died (limit {MEMORY // 2**30} GB)")
    finally:
        process.kill()
        process.join()
    return [
        line if isinstance(line, dict) else {"model": model_type, "attention": how, "failed": line}
        for how, line in zip(todo or ["?"], lines, strict=False)
    ]
