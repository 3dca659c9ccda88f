"""Other forms of an attention that compute the same, exactly: what a bridge at the site makes of it.

A form is a site of its own, whose operands are laid out otherwise; nodes, output and report stay those of the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neuron_attn_rewrite.graph.sizes import at, expression_of
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, Orders
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.spec import Band, Chunked, EmptyRows, MaskSpec
from neuron_attn_rewrite.patterns.axes import Atom, Dims, atoms, dim_size, layout_steps, merged, split
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.reasons import Reason

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

SIZES = ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim")
"""The fields of a site that are sizes."""


@dataclass(frozen=True)
class Form:
    """What a kernel call computes at a site."""

    site: AttentionSite
    proof: Proof
    problem: AttentionProblem
    reasons: tuple[Reason, ...] = ()
    """The bridges that led to it."""
    orders: Orders = AS_GIVEN
    """How the kernel's operands and its result lie; the site's targets are in these orders."""
    turned: int = 0
    """Bytes that are moved to lay out operands and result so, beyond what the model's own transposes move."""


def forms(site: AttentionSite, proof: Proof, values: Mapping[sympy.Symbol, int]) -> tuple[Form, ...]:
    """The attention as it was found, then what bridges make of it, for values of the symbols in its sizes."""
    found = ((site, proof, ()), in_chunks(site, proof))
    return tuple(Form(s, p, describe(s, p, values), reasons) for s, p, reasons in filter(None, found))


def in_chunks(site: AttentionSite, proof: Proof) -> tuple[AttentionSite, Proof, tuple[Reason, ...]] | None:
    """The chunks of a chunked mask as elements of the batch, each with the band alone: it is the same in every chunk.

    None where the mask says anything else, a chunk is cut short, or a row that sees no key would get the mean of
    another set of values.
    """
    chunks = {claim.size for claim in proof.mask.claims if isinstance(claim, Chunked)}
    others = tuple(claim for claim in proof.mask.claims if not isinstance(claim, Chunked))
    if len(chunks) != 1 or not all(isinstance(claim, Band) for claim in others) or proof.dense or proof.key_bounds:
        return None
    (size,) = chunks
    if site.q_len != site.kv_len or site.q_len % size or site.q_len == size or proof.empty_rows is EmptyRows.MEAN:
        return None
    operands = [_cut(operand, size) for operand in (site.query, site.key, site.value)]
    scaled = [_cut(scale.operand, size) for scale in site.operand_scales]
    result = _in_chunks(site.result, size)
    if None in operands or None in scaled or result is None or layout_steps(result, site.output_dims) is None:
        return None
    query, key, value = operands
    count = site.q_len // size
    assert query and key and value
    cut = replace(
        site,
        query=query,
        key=key,
        value=value,
        result=result,
        operand_scales=tuple(
            replace(scale, operand=operand)
            for scale, operand in zip(site.operand_scales, scaled, strict=True)
            if operand
        ),
        batch=site.batch * count,
        q_len=size,
        kv_len=size,
    )
    words = f"{count} chunks of {size} become {cut.batch} elements of the batch, and the mask {MaskSpec(others)}"
    return cut, replace(proof, mask=MaskSpec(others)), (Reason("bridge", words),)


def _cut(operand: Operand, size: int) -> Operand | None:
    """None where its layout can't be cut there."""
    target = _in_chunks(operand.target, size)
    if target is None or layout_steps(operand.dims, target, full=not operand.broadcasts) is None:
        return None
    return replace(operand, target=target)


def _in_chunks(target: Dims, size: int) -> Dims | None:
    """[batch, heads, length, dim] as [batch * chunks, heads, size, dim]."""
    batch, heads, length, dim = target
    cut = split(length, size) if length else ((), ())
    return cut and (merged((*batch, *cut[0])), heads, cut[1], dim)


# The problem that a site poses


def describe(site: AttentionSite, proof: Proof, values: Mapping[sympy.Symbol, int]) -> AttentionProblem:
    """What is to be computed at a site, without its nodes, for values of the symbols in its sizes."""
    shapes = [[at(n, values) for n in _broadcast_shape(d.term.dims, site.dims)] for d in proof.dense]
    example = at_example(site, values)
    return AttentionProblem(
        batch=example.batch,
        num_heads=example.num_heads,
        num_kv_heads=example.num_kv_heads,
        q_len=example.q_len,
        kv_len=example.kv_len,
        head_dim=example.head_dim,
        v_head_dim=example.v_head_dim,
        dtype=site.dtype,
        scale=site.scale,
        mask=proof.mask,
        bias_shape=tuple(max(dims) for dims in zip(*shapes, strict=True)) if shapes else None,
        softcap=site.softcap,
        sink=site.sink is not None,
        empty_rows=proof.empty_rows,
    )


def _broadcast_shape(dims: Dims, target: Dims) -> tuple[int, ...]:
    """1 for each target dim of which a tensor over `dims` has nothing."""
    axes = {atom.axis for atom in atoms(dims)}
    return tuple(dim_size(dim) if any(atom.axis in axes for atom in dim) else 1 for dim in target)


def at_example(site: AttentionSite, values: Mapping[sympy.Symbol, int]) -> AttentionSite:
    """The site with the sizes that it has for values of the symbols."""

    def dims(given: Dims) -> Dims:
        return tuple(tuple(Atom(a.axis, at(a.stride, values), at(a.size, values)) for a in dim) for dim in given)

    sizes = {name: at(getattr(site, name), values) for name in SIZES}
    return replace(site, output_dims=dims(site.output_dims), result=dims(site.result), **sizes)  # type: ignore[arg-type]


def size_from_data(site: AttentionSite, values: Mapping[sympy.Symbol, int]) -> str | None:
    """The first size of the site that is no function of the inputs' sizes, in words; None without one."""
    for name in SIZES:
        expression = expression_of(getattr(site, name))
        if not expression.free_symbols <= set(values):
            return f"{name} {expression}"
    return None
