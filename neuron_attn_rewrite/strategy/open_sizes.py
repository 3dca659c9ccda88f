"""Sizes of an attention that torch.export left open: their values in the example, and where a call can read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from neuron_attn_rewrite.graph.sizes import at, expression_of, input_sizes, parts_of, terms_of
from neuron_attn_rewrite.masks.affine import Size
from neuron_attn_rewrite.masks.behind import Behind
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.patterns.axes import Atom, Dims
from neuron_attn_rewrite.patterns.site import AttentionSite
from neuron_attn_rewrite.reasons import Reason

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

SIZES = ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim")
"""The fields of a site that are sizes."""


def at_example(site: AttentionSite, values: Mapping[sympy.Symbol, int]) -> AttentionSite:
    """The site with each symbol replaced by its value."""

    def dims(given: Dims) -> Dims:
        return tuple(tuple(Atom(a.axis, at(a.stride, values), at(a.size, values)) for a in dim) for dim in given)

    sizes = {name: at(getattr(site, name), values) for name in SIZES}
    return replace(site, output_dims=dims(site.output_dims), result=dims(site.result), **sizes)  # type: ignore[arg-type]


def size_from_data(site: AttentionSite, values: Mapping[sympy.Symbol, int]) -> str | None:
    """The first size, with its name, that is not a function of the inputs' sizes. None if all of them are."""
    for name in SIZES:
        expression = expression_of(getattr(site, name))
        if not expression.free_symbols <= set(values):
            return f"{name} {expression}"
    return None


def range_reason(site: AttentionSite) -> Reason:
    """For which sizes the kernel call is proven."""
    words = ", ".join(f"{name} {expression_of(getattr(site, name))}" for name in ("batch", "q_len", "kv_len"))
    return Reason("dynamic-sizes", f"holds for every {words}; chosen for the sizes of the example")


def missing_size(module: fx.GraphModule, site: AttentionSite, proof: Proof, behind: Behind | None = None) -> str | None:
    """A size that the kernel call needs and that is no sum of sizes of inputs. None if every size can be computed."""
    given = {"1", *names_of_input_sizes(module.graph)}
    operands = (site.query, *behind.sources.operands) if behind else site.operands
    layouts = [site.output_layout, *(o.layout for o in operands), *(d.layout for d in proof.dense)]
    numbers = [n for layout in layouts for step in layout if step.op != "permute" for n in step.arg]
    own = (site.batch, site.q_len, behind.sources.prior_len if behind else site.kv_len)
    sizes = [e for n in (*numbers, *own) for e in parts_of(n)[1]]
    needed = [str(e) for e in sizes if not given.issuperset(terms_of(e) or {str(e)})]
    computed = computed_sizes(module.graph)
    sums = [behind.length] if behind else [bound.end for bound in proof.key_bounds]
    ends = [of.name for end in sums for of in end.variables() if isinstance(of, Size)]
    needed += [name for name in ends if name not in computed]
    return next((name for name in needed if name not in given), None)


def names_of_input_sizes(graph: fx.Graph) -> set[str]:
    """The expressions of the open sizes that the inputs have."""
    return {str(size.node.expr) for _, _, size in input_sizes(graph) if isinstance(size, torch.SymInt)}


def computed_sizes(graph: fx.Graph) -> dict[str, fx.Node]:
    """For each expression that the graph computes as a number, the first node that does."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node.op == "call_function":
            found.setdefault(str(value.node.expr), node)
    return found
