"""Equivalent forms of an attention: as it was found, with the chunks of a chunked mask as batch elements, with the keys
of a cache apart from the new ones, and with keys and values in the blocks of a cache from which the model gathers them.

A form is a site with the same output, whose operands have another layout, are read from two sources, or are what the
model makes them of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from neuron_attn_rewrite.graph.sizes import at
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, Orders
from neuron_attn_rewrite.masks.behind import Behind
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.masks.spec import Band, Chunked, EmptyRows, MaskSpec
from neuron_attn_rewrite.patterns.axes import Dims, atoms, dim_size, layout_steps, merged, split
from neuron_attn_rewrite.patterns.blocks import InBlocks, in_blocks
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.problem import AttentionProblem, Prior
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.strategy.open_sizes import at_example

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Form:
    """What a kernel call computes at a site."""

    site: AttentionSite
    proof: Proof
    problem: AttentionProblem
    reasons: tuple[Reason, ...] = ()
    """The bridges that it needs."""
    orders: Orders = AS_GIVEN
    """The order of dims of each operand and of the result. The site's targets are in these orders."""
    blocks: InBlocks | None = None
    """How the model gathers key and value from a cache. The site's key and value are the cache then."""
    layout_bytes: int = 0
    """Bytes moved to bring operands and result into these orders, beyond those of the model's own transposes."""
    behind: Behind | None = None
    """The two sources of keys and values, if the call reads them apart."""

    @property
    def starts(self) -> tuple[fx.Node, ...]:
        """The tensors from which the query, the keys and the values of the attention and of the call are made."""
        of_keys = self.behind.sources.starts if self.behind else (self.site.key.node, self.site.value.node)
        return (self.site.query.node, *of_keys)


def forms(
    site: AttentionSite, proof: Proof, values: Mapping[sympy.Symbol, int], behind: Behind | None = None
) -> tuple[Form, ...]:
    """The attention as it was found, then its other forms, for values of the symbols in its sizes."""
    found = ((site, proof, ()), in_chunks(site, proof))
    whole = tuple(Form(s, p, problem_at(s, p, values), reasons) for s, p, reasons in filter(None, found))
    return whole if behind is None else (*whole, _apart(site, behind, values))


def _apart(site: AttentionSite, behind: Behind, values: Mapping[sympy.Symbol, int]) -> Form:
    """The keys and values of the cache apart from the new ones."""
    problem = problem_at(site, behind.proof, values)
    keys, new = (at(n, values) for n in (behind.sources.prior_len, behind.sources.new_len))
    is_masked = bool(behind.prior_paddings or behind.new_paddings)
    is_masked |= behind.sources.place is not None and not behind.in_range
    prior = Prior(keys, behind.window, behind.is_shared, is_masked)
    return Form(site, behind.proof, replace(problem, kv_len=keys + new, prior=prior), behind=behind)


def reads_in_place(
    site: AttentionSite, proof: Proof, values: Mapping[sympy.Symbol, int], prover: Prover
) -> Form | Reason | None:
    """The attention to a cache in blocks, without a copy of its keys and values. None if the model makes no such copy.

    A reason if a kernel can't read the cache at the output: the cache or the table changes after the copy is made.
    """
    blocks = in_blocks(site, prover.evaluator)
    if not isinstance(blocks, InBlocks):
        return blocks
    if any(scale.on == "value" for scale in site.operand_scales):
        return None
    for gathered in blocks.gathered:
        for node in gathered.node.all_input_nodes:
            if prover.writes.between(node, gathered.node, site.output):
                return Reason("cache-copied", f"{node.name} is written after {gathered.node.name} has read it")
    problem = replace(problem_at(site, proof, values), block_size=at(blocks.block_size, values))
    words = "the blocks of the cache are read in place, without a copy of their keys"
    of_cache = replace(site, key=blocks.key, value=blocks.value)
    return Form(of_cache, proof, problem, (Reason("cache-in-blocks", words),), blocks=blocks)


def in_chunks(site: AttentionSite, proof: Proof) -> tuple[AttentionSite, Proof, tuple[Reason, ...]] | None:
    """The chunks of a chunked mask as batch elements. Only the band of the mask is left, the same in every chunk.

    None if the mask has other claims, if the chunks do not divide the length, or if a row that sees no key gives the
    mean of all values: there would be fewer of them.
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
    """The operand with its length split into chunks. None if its layout can't be split there."""
    target = _in_chunks(operand.target, size)
    if target is None or layout_steps(operand.dims, target, full=not operand.broadcasts) is None:
        return None
    return replace(operand, target=target)


def _in_chunks(target: Dims, size: int) -> Dims | None:
    """[batch, heads, length, dim] as [batch * chunks, heads, size, dim]."""
    batch, heads, length, dim = target
    cut = split(length, size) if length else ((), ())
    return cut and (merged((*batch, *cut[0])), heads, cut[1], dim)


def problem_at(site: AttentionSite, proof: Proof, values: Mapping[sympy.Symbol, int]) -> AttentionProblem:
    """What the attention of a site computes, for values of the symbols in its sizes."""
    shapes = [[at(n, values) for n in _broadcast_shape(d.term.dims, site.dims)] for d in proof.dense]
    example = at_example(site, values)
    return AttentionProblem.of(
        (example.batch, example.num_heads, example.q_len, example.head_dim),
        (example.batch, example.num_kv_heads, example.kv_len, example.v_head_dim),
        site.dtype,
        site.scale,
        proof.mask,
        bias=[max(sizes) for sizes in zip(*shapes, strict=True)] if shapes else None,
        softcap=site.softcap,
        sink=site.sink is not None,
        empty_rows=proof.empty_rows,
    )


def _broadcast_shape(dims: Dims, target: Dims) -> tuple[int, ...]:
    """The target's shape, with 1 for each dim over which the tensor is broadcast."""
    axes = {atom.axis for atom in atoms(dims)}
    return tuple(dim_size(dim) if any(atom.axis in axes for atom in dim) else 1 for dim in target)
