"""Brings graphs of other tracers, and fused operators, to plain ATen with a shape on every node."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.errors import CaptureError
from neuron_attn_rewrite.graph.nodes import arguments, aten, attribute, fake_mode, op_name


@contextlib.contextmanager
def plain_transformers() -> Iterator[None]:
    """Trace torch.nn's transformer layers by their plain form.

    Their fast path computes the same numbers in another way (at positions that are not padding). They also read the
    values of a mask to see if it is causal, which a tracer can't do. Without that check the mask is applied as it is,
    and the result is the same.
    """
    layers = nn.modules.transformer
    detect = layers._detect_is_causal_mask
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        layers._detect_is_causal_mask = detect
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def data_detached() -> Iterator[None]:
    """Trace `x.data` as `x.detach()`, which it is but for checks of autograd. torch.export makes a constant of it."""
    plain: Any = Tensor.data

    def read(x: Tensor) -> Any:
        return x.detach() if isinstance(x, FakeTensor) else plain.__get__(x)

    def assign(x: Tensor, value: Tensor) -> None:
        if isinstance(x, FakeTensor):
            raise CaptureError("the model assigns to .data of a tensor, and no graph can hold that: use copy_()")
        plain.__set__(x, value)

    Tensor.data = property(read, assign)  # type: ignore[assignment]
    try:
        yield
    finally:
        del Tensor.data


@contextlib.contextmanager
def open_masks() -> Iterator[None]:
    """Let transformers build its masks by broadcasting: torch.export can't trace its torch.vmap with open sizes."""
    try:
        masking = importlib.import_module("transformers.masking_utils")
    except ImportError:
        yield
        return
    before = {name: getattr(masking, name) for name in VMAPS if hasattr(masking, name)}
    vars(masking).update(dict.fromkeys(before, _broadcast))
    try:
        yield
    finally:
        vars(masking).update(before)


VMAPS = ("_vmap_for_bhqkv", "_vmap_expansion_sdpa")
"""The functions of transformers 4 and 5 that map a function of four indices over all of them."""


def _broadcast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn a function of one (batch, head, query, key) into one of a vector of each: [batch, heads, query, key]."""

    def mask(*indices: Tensor) -> Tensor:
        apart = [i.reshape([-1 if axis == d else 1 for d in range(4)]) for axis, i in enumerate(indices)]
        return function(*apart).expand([i.shape[0] for i in indices])

    return mask


# Operators that hold an attention


def permute_by_name(module: fx.GraphModule) -> None:
    """Write an einsum that only permutes the dims of one tensor, as `ijbn->bnij`, as the view that it is."""
    for node in module.graph.find_nodes(op="call_function", target=aten.einsum.default):
        operands = node.args[1]
        inputs, _, out = str(node.args[0]).replace(" ", "").partition("->")
        if len(operands) == 1 and "." not in inputs and len(set(inputs)) == len(inputs) and set(inputs) == set(out):
            node.target, node.args = aten.permute.default, (operands[0], [inputs.index(letter) for letter in out])


def expand_fused(module: fx.GraphModule) -> None:
    """Replace flex_attention and the fused operators of torch.nn's transformer layers by what they compute."""
    for node in list(module.graph.nodes):
        expand = EXPANSIONS.get(op_name(node))
        if expand is not None:
            _splice(module, node, expand)


def _native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[batch, length, embed_dim], the mask True (or not 0) where hidden; `aten/.../transformers/attention.cpp`."""
    projections = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).reshape(*x.shape[:2], num_head, -1).transpose(1, 2) for x, w, b in projections)
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(2, 3)
    if mask is not None:
        shaped = mask.bool() if mask_type != 1 else mask.bool()[:, None, None]
        scores = scores.masked_fill(shaped, -torch.inf)
    weights = torch.softmax(scores, -1)
    output = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


def _transformer_encoder_layer_fwd(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """torch.nn.TransformerEncoderLayer in eval mode."""

    def attend(x: Tensor) -> Tensor:
        heads = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _native_multi_head_attention(x, x, x, *heads, mask, False, True, mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def _flex_attention(*args: Any, **kwargs: Any) -> Any:
    """torch's own definition: the score_mod and mask_mod are evaluated for all indices."""
    from torch._higher_order_ops.flex_attention import math_attention

    return math_attention(*args, **kwargs)


EXPANSIONS: Mapping[str, Callable[..., Any]] = {
    "_native_multi_head_attention": _native_multi_head_attention,
    "_transformer_encoder_layer_fwd": _transformer_encoder_layer_fwd,
    "flex_attention": _flex_attention,
}


def _splice(module: fx.GraphModule, node: fx.Node, function: Callable[..., Any]) -> None:
    """Replace a node by the graph of `function`, called with the node's arguments."""
    given = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    leaves, spec = pytree.tree_flatten(tuple(given.values()) if given else (*node.args, *node.kwargs.values()))
    tensors = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), Tensor)]
    inputs = list(dict.fromkeys(tensors))

    def run(*values: Tensor) -> Any:
        known = dict(zip(inputs, values, strict=True))
        return function(*pytree.tree_unflatten([_value(module, known, leaf) for leaf in leaves], spec))

    with torch.no_grad():
        plain = make_fx(run, _allow_non_fake_inputs=True)(*(n.meta["val"] for n in inputs))
    adopt_constants(module, plain, node.name, {})
    with module.graph.inserting_before(node):
        results = module.graph.graph_copy(plain.graph, dict(zip(plain.graph.find_nodes(op="placeholder"), inputs)))  # noqa: B905
    for inner in module.graph.nodes:
        inner.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    for user in list(node.users):
        part = results[user.args[1]]  # type: ignore[index]
        if isinstance(part, fx.Node):  # a result that is not asked for is None
            user.replace_all_uses_with(part)
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def adopt_constants(module: fx.GraphModule, traced: fx.GraphModule, prefix: str, known: Mapping[int, str]) -> None:
    """Give `module` the constants of a traced graph whose nodes it takes over.

    Args:
        module: what the graph becomes a part of.
        traced: the traced graph. Its attributes are renamed.
        prefix: the beginning of the new names, which tells them from others.
        known: the attributes that `module` has already, from the tensor's id to the name.
    """
    for inner in traced.graph.find_nodes(op="get_attr"):
        value = attribute(inner)
        name = known.get(id(value), f"{prefix}_{inner.target}")
        if id(value) not in known:
            setattr(module, name, value)
        inner.target = name


def _value(module: fx.GraphModule, known: Mapping[fx.Node, Tensor], leaf: Any) -> Any:
    if not isinstance(leaf, fx.Node):
        return leaf
    return known[leaf] if leaf in known else module.get_submodule(str(leaf.target))


# Numbers

PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)


def scale_by_tensors(module: fx.GraphModule) -> None:
    """Let products with `t.item()` read a copy of the tensor: no rule reads a number that only a call knows."""
    graph, mode = module.graph, fake_mode(module.graph)
    for node in [n for n in graph.nodes if n.target in (aten.item.default, aten._local_scalar_dense.default)]:
        read = node.args[0].meta["val"]
        users = [u for u in node.users if u.target in PRODUCTS and u.args[1] is node]
        if not users or read.dtype == torch.bool or read.is_complex():
            continue
        with graph.inserting_before(node), mode:
            number = graph.call_function(aten.detach.default, (node.args[0],))
            shaped = graph.call_function(aten.reshape.default, (number, []))
            copied = graph.call_function(aten.clone.default, (shaped,))
            number.meta["val"] = read.detach()
            shaped.meta["val"] = copied.meta["val"] = read.detach().reshape([]).clone()
        for user in users:
            kind = torch.result_type(user.args[0].meta["val"], copied.meta["val"])
            if kind == user.meta["val"].dtype and kind.is_floating_point:
                user.args = (user.args[0], copied)


# Shapes


def refresh_shapes(module: fx.GraphModule) -> None:
    """Give every node a fake tensor of one mode, if some node has none (as after make_fx or AOTAutograd).

    Symbolic sizes that are inputs themselves become the numbers of the example that they were traced with.
    """
    nodes = [n for n in module.graph.nodes if n.op in ("placeholder", "call_function", "get_attr")]
    values = [v for n in nodes for v in pytree.tree_leaves(n.meta.get("val"))]
    fakes = [v for v in values if isinstance(v, FakeTensor)]
    tensors = [v for v in values if isinstance(v, Tensor)]
    inputs = [n.meta.get("val") for n in nodes if n.op == "placeholder"]
    symbolic = any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in inputs)
    known = all("val" in n.meta for n in nodes if n.op != "call_function" or not _is_bookkeeping(n))
    modes = {v.fake_mode for v in fakes}
    open_mode = len(modes) <= 1 and all(mode.allow_non_fake_inputs for mode in modes)
    if known and not symbolic and len(fakes) == len(tensors) and open_mode:
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    class Refresh(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "get_attr" and isinstance(value, Tensor):
                value = mode.from_tensor(value, static_shapes=True)
            if n.op != "output":
                n.meta["val"] = value
            return value

    with mode, torch.no_grad():
        Refresh(module).run(*(_static(mode, value) for value in inputs))
    numbers = {n: n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), (int, float))}
    for n in module.graph.nodes:
        n.args, n.kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: numbers.get(a, a))


def _is_bookkeeping(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload)


def _static(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        with mode:
            return torch.empty_strided(
                [int(n) for n in value.shape],
                [int(n) for n in value.stride()],
                dtype=value.dtype,
                device=value.device,
                requires_grad=value.requires_grad,
            )
    return int(value) if isinstance(value, torch.SymInt) else value
