"""Writes one kernel call into the graph: its operands in the kernel's layout, its mask, and its result."""

from __future__ import annotations

import operator
from collections import Counter
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, fake_mode, shape
from neuron_attn_rewrite.graph.sizes import input_sizes, is_number, parts_of, terms_of
from neuron_attn_rewrite.graph.strides import with_strides
from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.kernels.orders import AS_GIVEN
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Size
from neuron_attn_rewrite.masks.behind import Behind
from neuron_attn_rewrite.masks.proof import Dense, Padding, Proof
from neuron_attn_rewrite.masks.spec import EmptyRows, Limited, MaskSpec
from neuron_attn_rewrite.patterns.axes import Layout, run_layout
from neuron_attn_rewrite.patterns.blocks import InBlocks
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.patterns.sources import Sources
from neuron_attn_rewrite.strategy.choose import Decision
from neuron_attn_rewrite.strategy.forms import Form
from neuron_attn_rewrite.strategy.legality import PRIOR
from neuron_attn_rewrite.strategy.open_sizes import computed_sizes, names_of_input_sizes

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

aten = torch.ops.aten
LARGEST_BOUND = 2**30
"""Larger bounds are reduced to this one. No tensor has so many keys, and the number fits int32."""
OF_BLOCKS = ("band_lower", "band_upper", "bounds")
"""The keyword arguments of `flash_fwd`, and not of every op, that `flash_blocks` has too."""
LAYOUT_OPS = {"reshape": aten.reshape.default, "permute": aten.permute.default, "expand": aten.expand.default}


class Emitter:
    """Adds nodes to a graph. The same operator on the same tensors is added once."""

    def __init__(self, module: fx.GraphModule, writes: Writes) -> None:
        self.module, self.graph = module, module.graph
        self._writes = writes
        self.added: list[fx.Node] = []
        self._known: dict[str, fx.Node] = {}
        self._mode = fake_mode(self.graph)
        self._body = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        # Read a size from the input from which the model reads it. Reading another input would make a new export assume
        # that both have this size.
        sizes = self.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        self._read = Counter({(n.args[0], n.args[1]): len(n.users) for n in sizes})
        self._top = list(self.graph.find_nodes(op="placeholder"))[-1]
        """The node after which the next size is added: sizes come before everything else."""

    def kernel_call(self, form: Form, decision: Decision) -> fx.Node:
        """Add the operands, the call right after the output, and the way back to the output's shape."""
        site, output = form.site, form.site.output
        self._site = output
        query = self._scaled(site, "query", self._operand(site.query, site.dtype))
        shared = {
            "scale": site.scale,
            "softcap": site.softcap,
            "sink": self._laid_out(site.sink) if site.sink else None,
            "lnc": decision.lnc,
        }
        if form.behind:
            op, operands, own = torch.ops.neuron_attn.flash_prior.default, *self._two_sources(form.behind, site)
            own["kernel_name"] = None if decision.kernel == PRIOR else decision.kernel
        else:
            op, operands, own = torch.ops.neuron_attn.flash_fwd.default, *self._one_source(form, decision)
        if form.blocks:
            op = torch.ops.neuron_attn.flash_blocks.default
            operands.append(self._table(form.blocks))
            own = {name: own[name] for name in OF_BLOCKS} | {"cache_order": form.blocks.order}
        options = {name: value for name, value in (shared | own).items() if value is not None}
        result = self._new(output.next, op, query, *operands, **options)
        if site.value_scale != 1.0:
            result = self._on(result, aten.mul.Scalar, site.value_scale)
        result = self._scaled(site, "output", result, result.next)
        result = self._cast(self._moved(result, site.output_layout), dtype(output))
        # The strides decide what a later reshape copies, and so what a write into it reaches.
        if self._writes.into_intermediates:
            same = with_strides(result, output.meta["val"], lambda op, node, *args: self._on(node, op, *args))
            assert same is not None  # else there is an obstacle
            result = same
        return result

    def _one_source(self, form: Form, decision: Decision) -> tuple[list[fx.Node], dict[str, Any]]:
        """Key and value, and the arguments of `flash_fwd` alone."""
        site, proof, band = form.site, form.proof, form.proof.mask.band
        operands = [
            self._operand(site.key, site.dtype),
            self._scaled(site, "value", self._operand(site.value, site.dtype)),
        ]
        return operands, {
            "band_lower": band.lower,
            "band_upper": band.upper,
            "key_padding": self._key_padding(proof.paddings, site.kv_len),
            "bounds": self._bounds(proof, site),
            "bias": self._bias(proof.dense, site.output),
            "empty_rows": "mean" if proof.empty_rows is EmptyRows.MEAN else None,
            "strategy": decision.strategy.name,
            "kernel_name": decision.kernel,
            "orders": None if form.orders == AS_GIVEN else str(form.orders),
        }

    def _two_sources(self, behind: Behind, site: AttentionSite) -> tuple[list[fx.Node], dict[str, Any]]:
        """Keys and values of both sources, how many of the first are used, and the arguments of `flash_prior` alone."""
        found = behind.sources
        operands = [self._operand(operand, site.dtype) for operand in found.operands]
        length = self._on(self._end(behind.length, site), aten.reshape.default, [-1])
        if not behind.in_range:
            most = self._size(found.prior_len)
            length = self._on(self._on(length, aten.clamp.default, 0), aten.clamp_max.default, most)
        seen = self._key_padding(behind.prior_paddings, found.prior_len)
        fresh = self._key_padding(behind.new_paddings, found.new_len)
        if found.place is not None:
            fresh = self._at_new_keys(found, behind, seen, site)
        return [*operands, length], {"window": behind.window, "prior_mask": seen, "new_mask": fresh}

    def _at_new_keys(self, found: Sources, behind: Behind, seen: fx.Node | None, site: AttentionSite) -> fx.Node | None:
        """Bool [batch | 1, q_len]: the key padding of an updated cache where the new keys are."""
        if seen is None and behind.in_range:
            return None
        steps = self._join(aten.arange.default, site.output, self._size(site.q_len), **self._whole(site))
        first = self._end(behind.length, site)
        places = self._join(aten.add.Tensor, site.output, first, self._on(steps, aten.unsqueeze.default, 0))
        inside = None if behind.in_range else self._on(places, aten.ge.Scalar, 0)
        if seen is None:
            return inside
        places = places if behind.in_range else self._on(places, aten.clamp.default, 0)
        rows = [self._size(max(shape(places)[0], shape(seen)[0])), -1]
        wide = [self._join(aten.expand.default, site.output, t, rows) for t in (seen, places)]
        at_places = self._join(aten.gather.default, site.output, wide[0], 1, wide[1])
        return at_places if inside is None else self._join(aten.logical_and.default, site.output, at_places, inside)

    def _table(self, blocks: InBlocks) -> fx.Node:
        """The block table, int32 [batch, blocks of an element]. It is checked where it comes from, before any write."""
        (one, _), source = blocks.gathered, blocks.table.node
        checked = self._on(source, torch.ops.neuron_attn.checked_blocks.default, self._size(one.blocks), one.wraps)
        return self._moved(checked, blocks.table.layout)

    def _scaled(self, site: AttentionSite, on: str, node: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """An operand or the result, multiplied or divided by its tensor scales."""
        for scale in site.operand_scales:
            if scale.on == on:
                by = aten.div.Tensor if scale.divides else aten.mul.Tensor
                scaled = self._join(by, before or site.output, node, self._laid_out(scale.operand))
                node = self._cast(scaled, site.dtype)
        return node

    def _operand(self, operand: Operand, to: torch.dtype) -> fx.Node:
        return self._cast(self._laid_out(operand), to)

    def _laid_out(self, operand: Operand) -> fx.Node:
        return self._moved(operand.node, operand.layout)

    def _moved(self, node: fx.Node, layout: Layout) -> fx.Node:
        moved = run_layout(
            layout, node, lambda op, value, arg: self._on(value, LAYOUT_OPS[op], self._order_or_sizes(op, arg))
        )
        assert isinstance(moved, fx.Node)
        return moved

    def _cast(self, node: fx.Node, to: torch.dtype) -> fx.Node:
        return node if dtype(node) == to else self._on(node, aten.to.dtype, to)

    def _key_padding(self, paddings: tuple[Padding, ...], keys: int) -> fx.Node | None:
        """Bool [batch | 1, keys], True where the key is seen."""
        vectors = []
        for padding in paddings:
            node = self._cast(padding.node, torch.bool)
            if len(shape(node)) != 2:
                node = self._on(node, aten.reshape.default, [-1, self._size(shape(node)[-1])])
            if shape(node)[1] != keys:
                node = self._on(node, aten.slice.Tensor, 1, padding.start, self._size(keys, padding.start))
            vectors.append(self._on(node, aten.logical_not.default) if padding.inverted else node)
        return self._joined(aten.logical_and.default, self._site, vectors)

    def _bias(self, dense: tuple[Dense, ...], output: fx.Node) -> fx.Node | None:
        """The sum of all dense terms. None is expanded to more than its own dims."""
        addends = [self._additive(d) for d in dense]
        if len(addends) > 1:  # a sum in 16 bits would round
            addends = [self._cast(addend, torch.promote_types(dtype(addend), torch.float32)) for addend in addends]
        moved = [self._moved(addend, d.layout) for addend, d in zip(addends, dense, strict=True)]
        return self._joined(aten.add.Tensor, output, moved)

    def _additive(self, dense: Dense) -> fx.Node:
        term = dense.term
        if term.kind == "add":
            addend = term.node if dtype(term.node).is_floating_point else self._cast(term.node, torch.float32)
            return addend if term.multiplier == 1.0 else self._on(addend, aten.mul.Scalar, term.multiplier)
        yes, no = (0.0, dense.fill) if term.kind == "show" else (dense.fill, 0.0)
        return self._on(self._cast(term.node, torch.bool), aten.where.Scalar, yes, no)

    def _bounds(self, proof: Proof, site: AttentionSite) -> fx.Node | None:
        """Int32 [batch | 1, q_len, 2]: the first key that each row sees, and the end."""
        claims = proof.mask.row_bounds
        is_constant = any(not isinstance(claim, Limited) for claim in claims.claims)
        constant = self._constant_bounds(claims, site) if is_constant else None
        if not proof.key_bounds:
            return constant
        join, before = self._join, site.output
        found: list[fx.Node | None] = []
        for column, is_lower in enumerate((True, False)):
            bounds = [bound for bound in proof.key_bounds if bound.is_lower == is_lower]
            ends = [self._end(bound.end + (not is_lower), site) for bound in bounds]
            if constant is not None:
                ends.append(join(aten.select.int, before, constant, -1, column))
            end = self._joined(aten.maximum.default if is_lower else aten.minimum.default, before, ends)
            found.append(end and join(aten.clamp.default, before, end, -LARGEST_BOUND, LARGEST_BOUND))
        lower, upper = found
        # An open side is made like the other one, so that all attentions with the same bounds share them.
        lower = lower or join(aten.full_like.default, before, upper, 0)
        columns = [lower, upper or join(aten.full_like.default, before, lower, LARGEST_BOUND)]
        sizes = [self._size(max(shape(c)[0] for c in columns)), self._size(site.q_len)]
        wide = [join(aten.expand.default, before, c, sizes) for c in columns]
        return self._cast(join(aten.stack.default, before, wide, -1), torch.int32)

    def _constant_bounds(self, claims: MaskSpec, site: AttentionSite) -> fx.Node:
        key = f"{claims} {claims.claims} {site.q_len} {site.kv_len}"
        if key not in self._known:
            name = f"_attention_bounds_{sum(name.startswith('_attention_bounds') for name in self.module._buffers)}"
            rows = claims.rows(site.q_len, site.kv_len)[None].int()
            self.module.register_buffer(name, rows, persistent=False)
            with self.graph.inserting_before(self._body):
                node = self.graph.get_attr(name)
            node.meta["val"] = self._mode.from_tensor(rows)
            self._known[key] = node
        return self._known[key]

    def _end(self, end: Affine, site: AttentionSite) -> fx.Node:
        """Int64 [batch | 1, q_len | 1]: a bound of each row, computed from elements, sizes and the query index."""
        before = site.output
        total: fx.Node | None = None
        for of, coefficient in end.terms:
            if isinstance(of, Element):
                node = self._elements(of, site)
            elif isinstance(of, Below):
                node = self._below(of, site)
            elif isinstance(of, Index):
                node = self._join(aten.arange.default, before, self._size(site.q_len), **self._whole(site))
                node = self._on(node, aten.unsqueeze.default, 0)
            elif isinstance(of, Floor):
                node = self._on(self._end(of.of, site), aten.floor_divide.Scalar, of.by)
            else:
                assert isinstance(of, Size)
                node = self._join(aten.full.default, before, [1, 1], self._named(of.name), **self._whole(site))
            node = node if coefficient == 1 else self._on(node, aten.mul.Scalar, coefficient)
            total = node if total is None else self._join(aten.add.Tensor, before, total, node)
        if total is None:
            return self._join(aten.full.default, before, [1, 1], end.constant, **self._whole(site))
        return self._on(total, aten.add.Scalar, end.constant) if end.constant else total

    def _elements(self, of: Element, site: AttentionSite) -> fx.Node:
        """The elements that the queries of each batch element read, int64 [batch | 1, q_len | 1]."""
        axes = [along.axis for index in of.index for along, _ in index.terms if isinstance(along, Index)]
        sizes = [self._size(site.batch) if 0 in axes else 1, self._size(site.q_len) if 2 in axes else 1]
        return self._on(self._cast(self._along(of.node, of.index, site), torch.int64), aten.reshape.default, sizes)

    def _below(self, of: Below, site: AttentionSite) -> fx.Node:
        """How many elements of a row are less than the number of each query, int64 [batch | 1, q_len | 1]."""
        row = self._on(self._along(of.node, of.row, site), aten.unsqueeze.default, -2)
        number = self._on(self._end(of.number, site), aten.unsqueeze.default, -1)
        return self._on(self._join(aten.lt.Tensor, site.output, row, number), aten.sum.dim_IntList, [-1])

    def _along(self, node: fx.Node, at: tuple[Affine, ...], site: AttentionSite) -> fx.Node:
        """Index the leading dims of a tensor: each at a constant, along the batch or along the queries."""
        dim = 0
        for index in at:
            if not index.terms:
                node = self._on(node, aten.select.int, dim, index.constant)
                continue
            ((along, _),) = index.terms
            assert isinstance(along, Index)
            length = site.batch if along.axis == 0 else site.q_len
            if shape(node)[dim] != length:
                node = self._on(node, aten.slice.Tensor, dim, index.constant, self._size(length, index.constant))
            dim += 1
        return node

    def _order_or_sizes(self, op: str, arg: tuple[int, ...]) -> list[Any]:
        if op == "permute":
            return list(arg)
        # A single symbol is written as -1, so that it need not be read from an input.
        follows = op == "reshape" and sum(not is_number(size) for size in arg) == 1
        return [-1 if follows and not is_number(size) else self._size(size) for size in arg]

    def _size(self, number: int, more: int = 0) -> fx.Node | int:
        """A size of the analysis plus a number. It is a node if the size is a symbol."""
        factor, expressions = parts_of(number)
        if not expressions:
            return number + more
        total: fx.Node | int = factor
        for expression in expressions:
            total = self._number(operator.mul, self._sum(expression), total)
        return self._number(operator.add, total, more) if isinstance(total, fx.Node) else total

    def _sum(self, expression: sympy.Expr) -> fx.Node:
        """The node that has this size as its value, if need be as a sum of sizes of inputs."""
        terms = terms_of(expression)
        if terms is None or str(expression) in names_of_input_sizes(self.graph):
            return self._named(str(expression))
        constant = terms.pop("1", 0)
        nodes = [self._number(operator.mul, self._named(name), factor) for name, factor in terms.items()]
        return self._number(operator.add, reduce(lambda a, b: self._at_top(operator.add, a, b), nodes), constant)

    def _named(self, expression: str) -> fx.Node:
        """The node that has this size as its value: a size of an input, or one that the model computes."""
        if expression not in names_of_input_sizes(self.graph):
            return computed_sizes(self.graph)[expression]
        given = [
            (node, dim)
            for node, dim, size in input_sizes(self.graph)
            if isinstance(size, torch.SymInt) and str(size.node.expr) == expression
        ]
        node, dim = max(given, key=lambda size: self._read[size])
        return node if dim is None else self._at_top(aten.sym_size.int, node, dim)

    def _number(self, target: Any, node: fx.Node, number: fx.Node | int) -> fx.Node:
        """A product or sum of sizes, at the top of the graph."""
        if number == (1 if target is operator.mul else 0):
            return node
        return self._at_top(target, node, number)

    def _at_top(self, target: Any, *args: Any) -> fx.Node:
        node = self._insert(self._top.next, target, *args)
        if node.prev is self._top:
            self._top = node
        return node

    def _whole(self, site: AttentionSite) -> dict[str, Any]:
        """The keyword arguments that make an int64 tensor on the query's device."""
        key = f"device of {site.query.node}"
        if key not in self._known:
            value = site.query.node.meta["val"].device
            with self.graph.inserting_before(self._behind(site.query.node)):
                self._known[key] = self.graph.call_function(getattr, (site.query.node, "device"))
            self._known[key].meta["val"] = value
        return {"dtype": torch.int64, "device": self._known[key]}

    def _joined(self, target: Any, before: fx.Node, nodes: list[fx.Node]) -> fx.Node | None:
        return reduce(lambda a, b: self._join(target, before, a, b), nodes) if nodes else None

    def _join(self, target: Any, before: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        """Add an operator in front of `before`."""
        return self._insert(before, target, *args, **kwargs)

    def _on(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Add an operator on one tensor: right after it, or at the site if the tensor is written in place."""
        if node in self._writes.changed:
            return self._new(self._site, target, node, *args)
        return self._insert(self._behind(node), target, node, *args)

    def _behind(self, node: fx.Node) -> fx.Node:
        return self._body if node.op == "placeholder" else node.next

    def _insert(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        key = f"{target}{args}{kwargs}"
        if key not in self._known:
            self._known[key] = self._new(before, target, *args, **kwargs)
        return self._known[key]

    def _new(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        fakes = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._mode:
            node.meta["val"] = target(*fakes[0], **fakes[1])
        self.added.append(node)
        return node
