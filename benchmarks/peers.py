"""The same graphs through Inductor's fuse_attention and through this package: found, right, wrong.

python -m benchmarks.peers              Inductor's own patterns, the spellings of the tests, small Hugging Face models
python -m benchmarks.peers --each       a line for each graph too

Inductor runs as in torch.compile; the step behind its joint passes gives the graph back unchanged, so no C++ is built.
"Fused" counts graphs with a scaled_dot_product_attention that was not there before (for Inductor) or with a kernel call
(for this package, verification switched off). "Wrong" counts graphs whose numbers differ from the original's on fresh
inputs by more than the tolerance; rows where the original gives NaN don't count.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.graph.nodes import op_name
from neuron_attn_rewrite.patterns.sdpa import is_sdpa
from tests.helpers import ALWAYS
from tests.patterns import test_inductor, test_spellings
from tests.patterns.cases import Keep, Match, as_module

COLUMNS = ("graphs", "Inductor fused", "Inductor wrong", "ours replaced", "ours wrong", "not captured")


@dataclass(frozen=True)
class Graph:
    """One model of a group, and inputs for it."""

    group: str
    name: str
    model: nn.Module
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    config: RewriteConfig = ALWAYS


class WithNumber(nn.Module):
    """A pattern of Inductor's with its scale as a number: Inductor refuses it as a tensor."""

    def __init__(self, pattern: nn.Module, is_number: list[bool]) -> None:
        super().__init__()
        self.pattern, self.is_number = pattern, is_number

    def forward(self, *tensors: Tensor) -> Any:
        rest = iter(tensors)
        return self.pattern(*(2.0 if number else next(rest) for number in self.is_number))


@dataclass(frozen=True)
class Outcome:
    fused: int
    error: float
    tolerance: float
    failure: str = ""

    @property
    def wrong(self) -> bool:
        return not self.failure and not self.error <= self.tolerance


def graphs() -> Iterator[Graph]:
    for case in test_inductor.patterns():
        model, like = case.values
        inputs = lambda like=like: (tuple(test_inductor.fresh(x) for x in like if x.dim()), {})  # noqa: E731
        pattern = WithNumber(model, [x.dim() == 0 for x in like])
        yield Graph("Inductor's own patterns", str(case.id), pattern, inputs, test_inductor.CONFIG)
    kinds = {Match: "spellings that must be found", Keep: "look-alikes"}
    for case in test_spellings.cases():
        (spelling,) = case.values  # type: ignore[attr-defined]
        group = kinds.get(type(spelling), "traps: right either way")
        inputs = lambda spelling=spelling: (spelling.inputs(), {})  # noqa: E731
        if "dropout" in str(case.id):  # what is drawn is another number for every tracer
            continue
        config = getattr(spelling, "config", ALWAYS)
        yield Graph(group, str(case.id), as_module(spelling.attention).eval(), inputs, config)  # type: ignore[attr-defined]
    yield from _models()


def _models() -> Iterator[Graph]:
    try:
        from tests.models import variants
    except ImportError:
        return
    for family, implementation in variants():
        if implementation == "eager":
            for padding in ("none", "left"):
                model = family.build(implementation)
                call = lambda family=family, padding=padding: ((), family.call(padding))  # noqa: E731
                yield Graph("Hugging Face, eager attention", f"{family.name}, padding {padding}", model, call)


def by_inductor(graph: Graph) -> Outcome:
    fused = 0

    def keep(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        nonlocal fused
        fused += sum(is_sdpa(node) for node in module.graph.nodes)
        return module.forward

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        nonlocal fused
        fused -= sum("scaled_dot_product" in op_name(n) or "scaled_dot" in str(n.target) for n in module.graph.nodes)
        return compile_fx(module, inputs, inner_compile=keep)

    torch._dynamo.reset()
    model = graph.model
    if isinstance(model, WithNumber):  # Dynamo does not look into functions of Inductor's own
        args, kwargs = graph.inputs()
        model = torch.export.export(model, args, kwargs, strict=False).module()
    return _compared(graph, torch.compile(model, backend=backend), lambda: max(fused, 0))


def by_us(graph: Graph) -> Outcome:
    args, kwargs = graph.inputs()
    rewritten = rewrite(graph.model, args, kwargs, config=replace(graph.config, verify=False))
    return _compared(graph, rewritten, lambda: len(rewritten.report.replaced))


def _compared(graph: Graph, other: Callable[..., Any], fused: Callable[[], int]) -> Outcome:
    args, kwargs = graph.inputs()
    results = []
    for module in (graph.model, other):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append([t for t in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(t, Tensor)])
    mask = kwargs.get("decoder_attention_mask", kwargs.get("attention_mask"))
    error, tolerance = 0.0, 1e-4
    for a, b in zip(*results, strict=True):
        if a.is_floating_point() and torch.finfo(a.dtype).bits < 32:
            tolerance = 2e-2
        if isinstance(mask, Tensor) and a.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        nan = a.isnan()
        a, b = a.double().masked_fill(nan, 0), b.double().masked_fill(nan, 0)
        difference = (a - b).nan_to_num(torch.inf).abs().max() if not torch.equal(a, b) else torch.zeros(())
        error = max(error, float(difference / a.abs().max().clamp_min(1e-30)))
    return Outcome(fused(), error, tolerance)


def attempt(how: Callable[[Graph], Outcome], graph: Graph) -> Outcome:
    torch.manual_seed(0)
    try:
        return how(graph)
    except Exception as error:  # a graph that can't be captured is a line of the table, not the end of it
        return Outcome(0, 0.0, 0.0, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="print a line for each graph")
    each = parser.parse_args().each
    warnings.simplefilter("ignore")
    groups: dict[str, list[tuple[Graph, Outcome, Outcome]]] = {}
    for graph in graphs():
        theirs, ours = attempt(by_inductor, graph), attempt(by_us, graph)
        groups.setdefault(graph.group, []).append((graph, theirs, ours))
        if each:
            said = [f"{o.failure or o.fused}{' WRONG' if o.wrong else ''} {o.error:.0e}" for o in (theirs, ours)]
            print(f"{graph.group} | {graph.name} | Inductor {said[0]} | ours {said[1]}", flush=True)
    print(f"torch {torch.__version__}\n\n| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for group, rows in groups.items():
        numbers = [len(rows)]
        for side in (1, 2):
            outcomes: list[Outcome] = [row[side] for row in rows]  # type: ignore[misc]
            numbers += [sum(o.fused > 0 for o in outcomes), sum(o.wrong for o in outcomes)]
        numbers.append(sum(bool(row[2].failure) for row in rows))
        print(f"| {group} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    main()
