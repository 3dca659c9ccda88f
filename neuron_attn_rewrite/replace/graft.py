"""The one step that changes the graph.

`graft` adds the kernel calls beside the attentions they stand for, and touches nothing that is there. `commit` then
lets the accepted ones take over, and what nobody reads any more goes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, dtype, eliminate_dead_code, fake_mode, op_name, shape
from neuron_attn_rewrite.graph.sizes import input_sizes, is_number, parts_of
from neuron_attn_rewrite.kernels.orders import AS_GIVEN
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Size
from neuron_attn_rewrite.masks.proof import Dense, Padding, Proof
from neuron_attn_rewrite.masks.spec import EmptyRows, Limited, MaskSpec, Unproven
from neuron_attn_rewrite.patterns.axes import Layout, run_layout
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.patterns.views import RESHAPES
from neuron_attn_rewrite.strategy.choose import Decision
from neuron_attn_rewrite.strategy.forms import Form

aten = torch.ops.aten
LARGEST_BOUND = 2**30
"""Larger bounds are cut to it: they are behind every key, and int32 holds them."""
LAYOUT_OPS = {"reshape": aten.reshape.default, "permute": aten.permute.default, "expand": aten.expand.default}


@dataclass(frozen=True)
class Plan:
    """Everything that was decided for one site, before anything is changed."""

    site: AttentionSite
    proof: Proof | Unproven
    form: Form | None
    """What a kernel would compute; None where nothing is proven."""
    decision: Decision
    example: AttentionSite
    """The site with the sizes of the example, where some are symbols."""


@dataclass(frozen=True, eq=False)
class Graft:
    """A kernel call that stands beside the attention of its plan."""

    plan: Plan
    proof: Proof
    result: fx.Node
    """The node that can take over from `plan.site.output`."""
    added: tuple[fx.Node, ...]


def missing_size(module: fx.GraphModule, site: AttentionSite, proof: Proof) -> str | None:
    """A size that the kernel call needs and that no input has; None without one."""
    given = _sizes_of_inputs(module.graph)
    layouts = [site.output_layout, *(o.layout for o in site.operands), *(d.layout for d in proof.dense)]
    numbers = [n for layout in layouts for step in layout if step.op != "permute" for n in step.arg]
    needed = [str(e) for n in (*numbers, site.batch, site.q_len, site.kv_len) for e in parts_of(n)[1]]
    computed = computed_sizes(module.graph)
    ends = [of.name for bound in proof.key_bounds for of in bound.end.variables() if isinstance(of, Size)]
    needed += [name for name in ends if name not in computed]
    return next((name for name in needed if name not in given), None)


def _sizes_of_inputs(graph: fx.Graph) -> set[str]:
    return {str(s.node.expr) for _, _, s in input_sizes(graph) if isinstance(s, torch.SymInt)}


def computed_sizes(graph: fx.Graph) -> dict[str, fx.Node]:
    """The first node that gives each size as a number."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node.op == "call_function":
            found.setdefault(str(value.node.expr), node)
    return found


def graft(module: fx.GraphModule, plans: Sequence[Plan], changed: frozenset[fx.Node]) -> list[Graft]:
    """Add one kernel call for each plan. Nothing that exists is changed.

    Args:
        module: the graph.
        plans: what is to be replaced.
        changed: the tensors that the graph writes into, `graph.Writes.changed`.
    """
    emitter = _Emitter(module, changed)
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    grafts = []
    for plan in sorted(plans, key=lambda plan: position[plan.site.output]):
        assert isinstance(plan.proof, Proof) and plan.form
        emitter.added = []
        result = emitter.kernel_call(plan.form, plan.decision)
        grafts.append(Graft(plan, plan.proof, result, tuple(emitter.added)))
    return grafts


def commit(module: fx.GraphModule, accepted: Sequence[Graft]) -> frozenset[str]:
    """Let the accepted grafts take over, and drop every node that nothing reads. The module's code is not made anew.

    Returns:
        The buffers that no kernel call reads, as their values are part of what it says: masks and scales.
    """
    unread = {
        str(node.target) for g in accepted for node in _constants(g.plan.site.output, g) - _constants(g.result, g)
    }
    said = frozenset(unread & dict(module.named_buffers(remove_duplicate=False)).keys())
    for g in accepted:
        for user in list(g.plan.site.output.users):
            if user not in g.added:
                user.replace_input_with(g.plan.site.output, g.result)
        _allow_any_strides(g.result)
    eliminate_dead_code(module.graph)
    module.graph.lint()
    return said


def _constants(end: fx.Node, g: Graft) -> set[fx.Node]:
    """The stored tensors from which a node is made, but for those behind the operands of the attention."""
    assert g.plan.form
    site, form = g.plan.site, g.plan.form.site
    reached = {o.node for s in (site, form) for o in (s.query, s.key, s.value)}
    stack, found = [end], set()
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += node.all_input_nodes
            found |= {node} if node.op == "get_attr" else set()
    return found


def _allow_any_strides(node: fx.Node) -> None:
    """Views behind a replaced output relied on its strides: a reshape does not."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if op_name(user) in RESHAPES | PERMUTES:
            _allow_any_strides(user)


class _Emitter:
    """Adds nodes; the same operator on the same tensors is added once."""

    def __init__(self, module: fx.GraphModule, changed: frozenset[fx.Node]) -> None:
        self.module, self.graph = module, module.graph
        self._changed = changed
        self.added: list[fx.Node] = []
        self._known: dict[str, fx.Node] = {}
        self._mode = fake_mode(self.graph)
        self._body = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        # Of inputs that share a size the model reads one: to read it of another would tie them when it is exported.
        sizes = self.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        self._read = Counter({(n.args[0], n.args[1]): len(n.users) for n in sizes})
        self._top = list(self.graph.find_nodes(op="placeholder"))[-1]
        """The last input, then the last size: sizes are before everything else that is added."""

    def kernel_call(self, form: Form, decision: Decision) -> fx.Node:
        """The kernel's operands, its call right behind the output, and the way back to the output's shape."""
        site, proof = form.site, form.proof
        mask, output = proof.mask, site.output
        self._site = output
        query = self._scaled(site, "query", self._operand(site.query, site.dtype))
        options = {
            "scale": site.scale,
            "band_lower": mask.band.lower,
            "band_upper": mask.band.upper,
            "key_padding": self._key_padding(proof.paddings, site),
            "bounds": self._bounds(proof, site),
            "bias": self._bias(proof.dense, output),
            "softcap": site.softcap,
            "sink": self._laid_out(site.sink) if site.sink else None,
            "empty_rows": "mean" if proof.empty_rows is EmptyRows.MEAN else None,
            "strategy": decision.strategy.name,
            "lnc": decision.lnc,
            "kernel_name": decision.kernel,
            "orders": None if form.orders == AS_GIVEN else str(form.orders),
        }
        result = self._new(
            output.next,
            torch.ops.neuron_attn.flash_fwd.default,
            query,
            self._operand(site.key, site.dtype),
            self._scaled(site, "value", self._operand(site.value, site.dtype)),
            **{name: value for name, value in options.items() if value is not None},
        )
        if site.value_scale != 1.0:
            result = self._on(result, aten.mul.Scalar, site.value_scale)
        result = self._scaled(site, "output", result, result.next)
        return self._cast(self._moved(result, site.output_layout), dtype(output))

    def _scaled(self, site: AttentionSite, on: str, node: fx.Node, before: fx.Node | None = None) -> fx.Node:
        """An operand or the result with its tensor scales applied."""
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

    def _key_padding(self, paddings: tuple[Padding, ...], site: AttentionSite) -> fx.Node | None:
        """Bool [batch | 1, kv_len], True where the key is seen."""
        vectors = []
        for padding in paddings:
            node = self._cast(padding.node, torch.bool)
            if len(shape(node)) != 2:
                node = self._on(node, aten.reshape.default, [-1, self._size(shape(node)[-1])])
            if shape(node)[1] != site.kv_len:
                node = self._on(node, aten.slice.Tensor, 1, padding.start, self._size(site.kv_len, padding.start))
            vectors.append(self._on(node, aten.logical_not.default) if padding.inverted else node)
        return self._joined(aten.logical_and.default, site.output, vectors)

    def _bias(self, dense: tuple[Dense, ...], output: fx.Node) -> fx.Node | None:
        """The sum of all dense terms, each as small as it broadcasts."""
        return self._joined(aten.add.Tensor, output, [self._moved(self._additive(d), d.layout) for d in dense])

    def _additive(self, dense: Dense) -> fx.Node:
        term = dense.term
        if term.kind == "add":
            addend = term.node if dtype(term.node).is_floating_point else self._cast(term.node, torch.float32)
            return addend if term.multiplier == 1.0 else self._on(addend, aten.mul.Scalar, term.multiplier)
        yes, no = (0.0, dense.fill) if term.kind == "show" else (dense.fill, 0.0)
        return self._on(self._cast(term.node, torch.bool), aten.where.Scalar, yes, no)

    def _bounds(self, proof: Proof, site: AttentionSite) -> fx.Node | None:
        """Int32 [batch | 1, q_len, 2] of the keys that each row sees."""
        claims = proof.mask.row_bounds
        is_constant = any(not isinstance(claim, Limited) for claim in claims.claims)
        constant = self._constant_bounds(claims, site) if is_constant else None
        if not proof.key_bounds:
            return constant
        join, before = self._join, site.output
        columns: list[fx.Node] = []
        for column, is_lower in enumerate((True, False)):
            bounds = [bound for bound in proof.key_bounds if bound.is_lower == is_lower]
            ends = [self._end(bound.end + (not is_lower), site) for bound in bounds]
            if constant is not None:
                ends.append(join(aten.select.int, before, constant, -1, column))
            end = self._joined(aten.maximum.default if is_lower else aten.minimum.default, before, ends)
            if end is None:
                end = join(aten.full.default, before, [1, 1], 0 if is_lower else LARGEST_BOUND, **self._whole(site))
            columns.append(join(aten.clamp.default, before, end, -LARGEST_BOUND, LARGEST_BOUND))
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
        """Int64 [batch | 1, q_len | 1] of a sum of elements and the index of the query."""
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
        """The leading dims of a tensor, each at one place or along the batch or the queries."""
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
        # One size that is a symbol follows from the others, as models write it: it then is read of no input.
        follows = op == "reshape" and sum(not is_number(size) for size in arg) == 1
        return [-1 if follows and not is_number(size) else self._size(size) for size in arg]

    def _size(self, number: int, more: int = 0) -> fx.Node | int:
        """A size of the analysis, plus a number, as an argument: a node where it is a symbol."""
        factor, expressions = parts_of(number)
        if not expressions:
            return number + more
        total: fx.Node | int = factor
        for expression in expressions:
            total = self._number(operator.mul, self._named(str(expression)), total)
        return self._number(operator.add, total, more) if isinstance(total, fx.Node) else total

    def _named(self, expression: str) -> fx.Node:
        """The node that gives a size: of an input, or computed by the model."""
        if expression not in _sizes_of_inputs(self.graph):
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
        """The options of a tensor of integers beside the query."""
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
        """An operator on what is computed before `before`."""
        return self._insert(before, target, *args, **kwargs)

    def _on(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """An operator on one tensor, right behind it; at the site where the tensor may change until then."""
        if node in self._changed:
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
