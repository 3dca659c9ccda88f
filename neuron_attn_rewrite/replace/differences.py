"""How far the result of one kernel call is from the attention that it can replace."""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.capture.compare import relative_difference
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.graph.nodes import attribute
from neuron_attn_rewrite.graph.sizes import at, examples
from neuron_attn_rewrite.masks.nan_readers import nan_is_read
from neuron_attn_rewrite.masks.proof import Padding
from neuron_attn_rewrite.masks.spec import Band, EmptyRows, MaskSpec
from neuron_attn_rewrite.patterns.axes import Layout, layout_steps, run_layout
from neuron_attn_rewrite.patterns.extent import inside
from neuron_attn_rewrite.patterns.site import MASKED, Term
from neuron_attn_rewrite.replace.exact import in_float64
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.running import Values

LARGEST_ROUNDING = 1e-2
"""If the model's own rounding changes a row that sees no key by more than this, the row is what the rounding made."""


class Measured:
    """Measures the kernel calls of one graph."""

    def __init__(self, graph: fx.Graph, config: RewriteConfig) -> None:
        self.config, self.sizes = config, examples(graph)
        self.extent = cache(lambda graft: inside(graft.verdict.site))
        self.nan_is_read = cache(lambda graft: nan_is_read(graft.verdict.site.output))

    def reads(self, graft: Graft) -> set[fx.Node]:
        """The nodes whose values `error` reads."""
        site = graft.verdict.site
        read: set[fx.Node] = self.extent(graft)[1]
        vectors = {padding.node for padding in graft.proof.promised}
        return {site.output, *read, *vectors, *(term.node for term in site.terms), *(o.node for o in site.operands)}

    def error(self, graft: Graft, values: Values, new: Tensor) -> float:
        """The largest difference, relative to the largest magnitude. Undefined rows are ignored.

        If it is above the tolerance, the kernel is compared with the original in float64 too, and the smaller error
        counts: the model may round more than the kernel does. In a row that sees no key, rounding may decide alone what
        the model computes. Then the kernel must give what the model gives.
        """
        old, new = values[graft.verdict.site.output].detach().double(), new.detach().double()
        if old.shape != new.shape:
            return torch.inf
        counts = self._defined(graft, values, old)
        scale = _scale(old, counts)
        difference = _distance(old, new, counts)
        worst = _largest(difference) / scale
        if worst <= self.tolerance(graft):
            return float(worst)
        exact = in_float64(self.extent(graft)[0], values, attribute)
        if exact is None:
            return float(worst)
        exact = torch.where(old.isnan(), old, exact)
        to_exact = _distance(exact, new, counts & (old != new))
        empty = self._empty_rows(graft, values)
        empty = torch.zeros_like(counts) if empty is None else empty
        rounding = _largest(_distance(exact, old, counts & empty))
        seeing = torch.minimum(_largest(difference.where(~empty, 0)), _largest(to_exact.where(~empty, 0)))
        seeing_none = _largest(difference.where(empty, 0))
        if rounding <= LARGEST_ROUNDING * scale:
            seeing_none = seeing_none - 2 * rounding
        return float(torch.maximum(seeing, seeing_none) / scale)

    def tolerance(self, graft: Graft) -> float:
        return self.config.tolerance(graft.verdict.site.coarsest)

    def noise(self, graft: Graft, values: Values, _: Tensor | Exception) -> Tensor:
        """The output of the attention with noise of the accepted size."""
        output: Tensor = values[graft.verdict.site.output]
        size = self.tolerance(graft) * output.abs().nan_to_num(0, 0).max()
        return output + torch.randn(output.shape).to(output) * size

    def instead(self, graft: Graft, values: Values, new: Tensor | Exception) -> Tensor:
        """The result of the kernel call. Rows that do not matter, as the caller promised, have the model's values."""
        assert isinstance(new, Tensor)
        if self.config.empty_rows != "any" and not graft.proof.promised:
            return new
        old: Tensor = values[graft.verdict.site.output]
        counts = self._defined(graft, values, old)
        return torch.where(counts | old.isnan(), new, old)

    def _defined(self, graft: Graft, values: Values, old: Tensor) -> Tensor:
        """Bool in the shape of the output: the elements that the model defines, and that the caller did not give up."""
        site, proof = graft.verdict.site, graft.proof
        counts = torch.ones_like(old, dtype=torch.bool)
        tensors = [values[n] for n in (*(o.node for o in site.operands), *(t.node for t in site.terms))]
        from_operands = any(bool(t.isnan().any()) for t in tensors if t.is_floating_point())
        is_any = proof.empty_rows is EmptyRows.ANY or site.overflows  # the model does not read NaN of either
        if is_any or (from_operands and not self.nan_is_read(graft)):
            counts = ~old.isnan()
        if self.config.empty_rows == "any":
            empty = self._empty_rows(graft, values)
            counts = counts if empty is None else counts & ~empty
        for padding in proof.promised:
            rows = _vector(padding, values[padding.node], graft.verdict.example.kv_len)
            counts = counts & self._in_output(graft, rows[:, None, :])
        return counts

    def _empty_rows(self, graft: Graft, values: Values) -> Tensor | None:
        """Bool in the shape of the output: the rows in which the model's own masks hide each key. None for none.

        They are read from the model's tensors, so they do not depend on what was proven.
        """
        site, example = graft.verdict.site, graft.verdict.example
        layouts = [(term, layout_steps(term.dims, site.dims)) for term in site.terms]
        hidden = [self._moved(steps, _hides(term, values[term.node])) for term, steps in layouts if steps is not None]
        if site.is_causal:
            causal = MaskSpec((Band(upper=0),)).visible(example.q_len, example.kv_len)
            hidden.append(~causal[None, None].to(values[site.output].device))
        if not hidden:
            return None
        return self._in_output(graft, reduce(torch.logical_or, hidden).all(-1))

    def _in_output(self, graft: Graft, rows: Tensor) -> Tensor:
        """Bool [batch | 1, heads | 1, q_len | 1] in the shape of the output."""
        e = graft.verdict.example
        full = rows[..., None].expand(e.batch, e.num_heads, e.q_len, e.v_head_dim)
        return self._moved(graft.verdict.site.output_layout, full)

    def _moved(self, layout: Layout, value: Tensor) -> Tensor:
        moved = run_layout(
            layout, value, lambda op, t, arg: getattr(t, op)(tuple(at(number, self.sizes) for number in arg))
        )
        assert isinstance(moved, Tensor)
        return moved


def output_error(old: Tensor, new: Tensor) -> float:
    """The largest difference of an output of a model, relative to its largest magnitude. NaN in `old` is ignored."""
    if old.shape != new.shape:
        return torch.inf
    return relative_difference(old, new)


def _distance(old: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    same = (old == new) | (old.isnan() & new.isnan())
    return (old - new).abs().where(counts & ~same, 0).nan_to_num(torch.inf, torch.inf)


def _scale(old: Tensor, counts: Tensor) -> Tensor:
    return _largest(old.abs().where(counts & old.isfinite(), 0)).clamp_min(torch.finfo(torch.float32).tiny)


def _largest(value: Tensor) -> Tensor:
    return value.max() if value.numel() else value.new_zeros(())


def _hides(term: Term, value: Tensor) -> Tensor:
    """Where a term hides a key."""
    if term.kind == "add":
        return value.double() * term.multiplier <= MASKED
    seen = value.bool() if term.kind == "show" else ~value.bool()
    return ~seen & (term.fill <= MASKED)


def _vector(padding: Padding, value: Tensor, kv_len: int) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])[:, padding.start : padding.start + kv_len].bool()
    return ~rows if padding.inverted else rows
