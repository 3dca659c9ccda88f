"""Proves the masks of a site: which keys each query sees, for every input.

First, each term is evaluated at symbolic indices (`masks/symbolic.py`, `masks/conditions.py`). If that gives no claim
and all sizes are numbers, the term is evaluated element by element (`masks/read.py`) and fitted to claims
(`masks/fit.py`). A term without a claim becomes a dense additive operand of the kernel. Last, we find out what the
model computes for a row that sees no key (`masks/empty_rows.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.graph.nodes import arguments, dtype, grad_modes, is_tensor, op_name, shape
from neuron_attn_rewrite.graph.sizes import has_symbols, is_number
from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.masks.addends import fills_of_addends, may_hide, rounds_alike
from neuron_attn_rewrite.masks.bounds import KeyBound
from neuron_attn_rewrite.masks.conditions import Conditions, conditions
from neuron_attn_rewrite.masks.empty_rows import Effect, empty_row_value, may_be_nan
from neuron_attn_rewrite.masks.fit import fit_rows
from neuron_attn_rewrite.masks.nan_readers import nan_is_read
from neuron_attn_rewrite.masks.proof import Dense, Padding, Proof
from neuron_attn_rewrite.masks.read import OtherForm, read
from neuron_attn_rewrite.masks.spec import Band, Claim, EmptyRows, KeyPadding, Limited, MaskSpec, Unproven
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from neuron_attn_rewrite.patterns.axes import Dims, dim_size, layout_steps
from neuron_attn_rewrite.patterns.site import MASKED, AttentionSite, Term, hides
from neuron_attn_rewrite.patterns.views import broadcast
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.evaluator import Evaluator
from neuron_attn_rewrite.values.exact import is_algebraic, number_in, sums_are_fine
from neuron_attn_rewrite.values.ranges import Ranges


@dataclass(frozen=True)
class _Claimed:
    """One term for which there is a claim."""

    spec: MaskSpec
    fill: float | None = None
    """The number by which it hides keys, None if it uses several."""
    paddings: tuple[Padding, ...] = ()
    key_bounds: tuple[KeyBound, ...] = ()
    assumptions: tuple[Reason, ...] = ()


class Prover:
    """Proves the masks of the sites of one graph. A mask that several sites share is proven once."""

    def __init__(self, module: fx.GraphModule, config: RewriteConfig) -> None:
        self.module, self.config = module, config
        self.writes = Writes(module.graph)
        self.writes.mark()
        self.evaluator = Evaluator(module, self.writes.changed)
        self.ranges = Ranges(self.writes.changed)
        self.symbolic = SymbolicEvaluator(module, changed=self.writes.changed)
        self.named = SymbolicEvaluator(module, changed=self.writes.changed, names_numbers=True)
        self.grad_modes = grad_modes(module.graph)
        self.is_dynamic = has_symbols(module.graph)
        self._known: dict[tuple[Term, Dims], _Claimed | Unproven] = {}

    def prove(self, site: AttentionSite) -> Proof | Unproven:
        """What is known of the site's terms. `Unproven` if a term can't be a dense operand either."""
        proof = self.claims(site)
        is_other = isinstance(proof, Proof) and proof.empty_rows is EmptyRows.OTHER
        return self._all_dense(site) or proof if is_other else proof

    def claims(self, site: AttentionSite) -> Proof | Unproven:
        """As `prove`, also if a row that sees no key gives something that no kernel computes from these claims."""
        proof = Proof(MaskSpec((Band(upper=0),)) if site.is_causal else MaskSpec())
        effects = [Effect(-torch.inf)] if site.is_causal else []
        for term, claimed, is_part in self._read(site.terms, site.dims):
            replaces = term.kind != "add" and not is_part
            if isinstance(claimed, _Claimed):
                proof = _add_claim(proof, claimed)
                if claimed.spec.claims:
                    effects.append(Effect(claimed.fill, replaces, zeroes_weights=term.zeroes_weights))
                continue
            layout = layout_steps(term.dims, site.dims)
            if layout is None:
                return Unproven(Reason("mask-axes", f"{term.node.name} does not run along the axes of the scores"))
            if term.kind != "add":
                if not hides(term.fill):
                    return Unproven(claimed.reason.behind(f"{term.node.name}: "))
                effects.append(Effect(term.fill, replaces, zeroes_weights=term.zeroes_weights))
            else:
                effects.append(Effect(None if may_hide(term, self.ranges) else 0.0, is_dense=True))
            reason = claimed.reason.behind(f"{term.node.name} is a dense operand: ")
            proof = replace(proof, dense=(*proof.dense, Dense(term, layout)), reasons=(*proof.reasons, reason))
        return self._decide_empty_rows(self._apply_padding_promise(proof, site), site, effects)

    def _read(
        self, terms: tuple[Term, ...], dims: Dims, are_parts: bool = False
    ) -> Iterator[tuple[Term, _Claimed | Unproven, bool]]:
        """Each term, its claim, and whether the term is a part of an added tensor.

        An added tensor without a claim is split into parts, if it is a sum, and each part is read.
        """
        for term in terms:
            claimed = self._claim_once(term, dims)
            parts = self.parts(term, dims) if isinstance(claimed, Unproven) else ()
            if parts:
                yield from self._read(parts, dims, are_parts=True)
            else:
                yield term, claimed, are_parts

    def _claim_once(self, term: Term, dims: Dims) -> _Claimed | Unproven:
        if (term, dims) not in self._known:
            self._known[term, dims] = self._claim(term, dims)
        return self._known[term, dims]

    def parts(self, term: Term, dims: Dims) -> tuple[Term, ...]:
        """The parts of an added tensor: the two sides of a sum, or a bias and the mask that overwrites it.

        Only in a floating dtype. In 16 bits the sum of two biases is rounded, so one part must be a mask: what it adds
        where a key is seen is 0.
        """
        node = term.node
        if term.kind != "add" or node.op != "call_function" or not is_algebraic(dtype(node)):
            return ()
        name, given = op_name(node), arguments(node)

        def part(kind: str, tensor: object, fill: float | None = None) -> Term:
            assert isinstance(tensor, fx.Node)
            along = broadcast(tensor, term.dims)
            return replace(term, node=tensor, dims=along) if fill is None else Term(kind, tensor, along, fill=fill)

        if name == "add" and given["alpha"] == 1 and is_tensor(given["self"]) and is_tensor(given["other"]):
            parts = part("add", given["self"]), part("add", given["other"])
            is_exact = sums_are_fine(dtype(node)) or any(self._is_mask(p, dims) for p in parts)
            return parts if is_exact else ()
        overwrites = {
            "where": [("show", "condition", "self", "other"), ("hide", "condition", "other", "self")],
            "masked_fill": [("hide", "mask", "self", "value")],
        }
        for kind, mask, bias, value in overwrites.get(name, []):
            number = self.evaluator.constant(given.get(value))
            fill = None if number is None else term.hiding(number_in(dtype(node), number))
            if fill is None or not hides(fill) or not is_tensor(given[bias]) or not is_tensor(given[mask]):
                continue
            if self.ranges.of(given[bias]).highest < torch.inf:  # a kernel adds the bias to hidden scores as well
                return part("add", given[bias]), part(kind, given[mask], fill)
        return ()

    def _is_mask(self, term: Term, dims: Dims) -> bool:
        """Whether an added tensor only hides keys: it is claimed, or made of parts that are."""
        if isinstance(self._claim_once(term, dims), _Claimed):
            return True
        parts = self.parts(term, dims)
        return bool(parts) and all(p.kind != "add" or self._is_mask(p, dims) for p in parts)

    def _claim(self, term: Term, dims: Dims) -> _Claimed | Unproven:
        """At symbolic indices first, which is fast; otherwise element by element."""
        sizes = tuple(self.symbolic.size(dim_size(dim)) for dim in dims)
        found = conditions(term, dims, sizes, self.symbolic)
        if isinstance(found, Unproven):
            named = conditions(term, dims, sizes, self.named)
            found = found if isinstance(named, Unproven) else named
        if self.is_dynamic:
            return found if isinstance(found, Unproven) else _claimed(found)
        if isinstance(found, Unproven):
            return self._read_element_by_element(term, dims)
        if all(bound.is_runtime for bound in found.key_bounds):
            return _claimed(found)
        constant = self._read_element_by_element(term, dims)
        return _claimed(found) if isinstance(constant, Unproven) else constant

    def _read_element_by_element(self, term: Term, dims: Dims) -> _Claimed | Unproven:
        reading = read(term, dims, self.evaluator)
        if isinstance(reading, Unproven):
            return reading
        claims = fit_rows(reading.rows, dim_size(dims[3]))
        if reading.cells is None:
            return _Claimed(MaskSpec(claims), reading.fill)
        padding = self._padding(reading.cells, reading.inverted)
        if isinstance(padding, Unproven):
            return padding
        leaf = self.evaluator.leaf(padding.node)
        assumed = (assumption(leaf.node),) if leaf.assumed else ()
        spec = MaskSpec((*claims, KeyPadding(leaf.node.name)))
        return _Claimed(spec, reading.fill, (padding,), assumptions=assumed)

    def _padding(self, cells: Tensor, inverted: bool) -> Padding | Unproven:
        """The 0/1 tensor of which each key reads its own element."""
        leaf = self.evaluator.leaf_of(int(cells.max()))
        width = shape(leaf.node)[-1] if shape(leaf.node) else 1
        batch, kv_len = cells.shape
        offset = cells - leaf.first - torch.arange(batch)[:, None] * width - torch.arange(kv_len)
        used = cells >= 0
        start = int(offset[used][0])
        if vectors_of(leaf.node) != batch or (offset[used] != start).any() or not 0 <= start <= width - kv_len:
            return Unproven(Reason("mask-padding", f"its keys do not each read their own element of {leaf.node.name}"))
        return Padding(leaf.node, start, inverted)

    def _apply_padding_promise(self, proof: Proof, site: AttentionSite) -> Proof:
        """Drop the key padding if the caller promised right padding.

        Under a causal mask, a query that is not padding then sees no padding.
        """
        causal = any(isinstance(c, Band) and c.upper is not None and c.upper <= 0 for c in proof.mask.claims)
        padded = [c for c in proof.mask.claims if isinstance(c, KeyPadding)]
        of_masks = all(_is_of_a_mask(padding.node) for padding in proof.paddings)
        if not padded or not causal or not of_masks or site.q_len != site.kv_len:
            return proof
        if self.config.padding != "right":
            possible = Reason("padding-promise", 'padding="right" would drop the key padding')
            return replace(proof, reasons=(*proof.reasons, possible))
        kept = MaskSpec(tuple(c for c in proof.mask.claims if c not in padded))
        words = 'padding="right": key padding dropped, rows past the length are undefined'
        reason = Reason("padding-promise", words)
        return replace(proof, mask=kept, paddings=(), promised=proof.paddings, reasons=(*proof.reasons, reason))

    def _decide_empty_rows(self, proof: Proof, site: AttentionSite, effects: list[Effect]) -> Proof:
        """Add what the model computes for a row that sees no key."""
        possible = (
            bool(proof.paddings)
            or not all(bound.shows_itself for bound in proof.key_bounds)
            or any(d.term.kind != "add" or may_hide(d.term, self.ranges) for d in proof.dense)
            or not _sees_a_key(proof, site)
        )
        return replace(proof, empty_rows=self.empty_row(site, effects) if possible else EmptyRows.NEVER)

    def empty_row(self, site: AttentionSite, effects: list[Effect]) -> EmptyRows:
        """What the model computes for a row that sees no key, by the effects of its terms."""
        if site.sink is not None and self.ranges.factor(site.sink.node).lowest > MASKED:
            return EmptyRows.ZERO  # the sink takes the whole probability
        if self.config.empty_rows == "any":
            return EmptyRows.ANY
        if site.sink is not None:
            return EmptyRows.OTHER  # the sink may be as low as the hidden scores
        given = empty_row_value(effects, site)
        is_dense = any(effect.is_dense and effect.hides for effect in effects)
        if is_dense and not rounds_alike(site, self._fills(site), self.ranges):
            return EmptyRows.OTHER
        if (given is EmptyRows.ANY or may_be_nan(effects, site)) and nan_is_read(site.output):
            return EmptyRows.OTHER
        return given

    def _fills(self, site: AttentionSite) -> list[float | None]:
        """The number by which each term of the site hides keys, None where that is not known."""
        found = [self._claim_once(term, site.dims) for term in site.terms]
        return [one.fill if isinstance(one, (_Claimed, OtherForm)) else None for one in found]

    def _all_dense(self, site: AttentionSite) -> Proof | None:
        """Every term as a dense operand, so that a row that sees no key gets the softmax that the model computes."""
        layouts = [layout_steps(term.dims, site.dims) for term in site.terms]
        fills = fills_of_addends(site, self._fills(site), self.ranges, nan_is_read(site.output))
        if None in layouts or fills is None:
            return None
        each = zip(site.terms, layouts, fills, strict=True)
        words = (
            "a row may see no key, and gets the softmax of its hidden scores: the masks stay dense operands "
            '(set empty_rows="any" if such rows do not matter)'
        )
        return Proof(
            dense=tuple(Dense(term, layout, fill) for term, layout, fill in each if layout is not None),
            reasons=(Reason("empty-rows-dense", words),),
        )


def _claimed(found: Conditions) -> _Claimed:
    claims: list[Claim] = [] if found.band == Band() else [found.band]
    claims += [Limited(str(bound)) for bound in found.key_bounds]
    claims += [KeyPadding(node.name) for node, *_ in found.paddings]
    paddings = tuple(Padding(*padding) for padding in found.paddings)
    assumptions = tuple(map(assumption, found.assumed))
    return _Claimed(MaskSpec(tuple(claims)), found.fill, paddings, found.key_bounds, assumptions)


def assumption(node: fx.Node) -> Reason:
    return Reason("binary-input", f"{node.name} holds only 0 and 1")


def _add_claim(proof: Proof, claimed: _Claimed) -> Proof:
    return replace(
        proof,
        mask=proof.mask & claimed.spec,
        paddings=tuple(dict.fromkeys((*proof.paddings, *claimed.paddings))),
        key_bounds=tuple(dict.fromkeys((*proof.key_bounds, *claimed.key_bounds))),
        reasons=tuple(dict.fromkeys((*proof.reasons, *claimed.assumptions))),
    )


def _is_of_a_mask(node: fx.Node) -> bool:
    """Whether it is an input with `mask` in its name, perhaps cast or compared. Right padding is promised of these."""
    while len(node.all_input_nodes) == 1 and op_name(node) in ("to", "_to_copy", "ne", "eq", "gt", "logical_not"):
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and "mask" in node.name


def _sees_a_key(proof: Proof, site: AttentionSite) -> bool:
    """Whether each row sees a key, apart from key padding and from key bounds that may hide a query's own key."""
    mask = proof.mask
    if not is_number(site.q_len) or not is_number(site.kv_len):
        lower, upper = mask.band.lower or 0, mask.band.upper or 0
        sees_itself = site.q_len == site.kv_len and lower <= 0 <= upper
        return all(isinstance(c, Limited) for c in mask.row_bounds.claims) and (mask.band == Band() or sees_itself)
    rows = mask.rows(site.q_len, site.kv_len)
    if not proof.key_bounds:
        return bool((rows[:, 1] > 0).all())
    itself = torch.arange(site.q_len)
    return bool(((rows[:, 0] <= itself) & (itself < rows[:, 1])).all())


def vectors_of(node: fx.Node) -> int:
    """How many rows, along its last dim, a tensor holds."""
    sizes = shape(node)
    return 1 if not sizes else int(torch.Size(sizes[:-1]).numel())
