"""The attention ops `torch.ops.neuron_attn.*`. Importing this module registers them.

`flash_fwd` has a fast CPU implementation, a decomposition for every other device, a fake one, and gradients by
`flash_bwd`, which recomputes the scores; on a Neuron device a kernel of the SDK does where one is installed and can
(`kernels.vendor.BACKWARD`). `flash_fwd` computes

    softmax(softcap(scale * query key^T) + bias, sink) value

with query [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim] and value [batch,
num_kv_heads, kv_len, v_head_dim] of one floating dtype and any strides. Query head h reads kv head
`h // (num_heads // num_kv_heads)`. The result is [batch, num_heads, q_len, v_head_dim], contiguous, in query's
dtype; scores and softmax are float32 (float64 for float64).

Query row i of batch element b sees key j iff all of these hold that are given:

* `i + band_lower <= j`, `j <= i + band_upper`
* `key_padding[b, j]`, bool [batch | 1, kv_len]
* `bounds[b, i, 0] <= j < bounds[b, i, 1]`, int [batch | 1, q_len, 2]
* the bias, float [batch | 1, num_heads | 1, q_len | 1, kv_len | 1], is not -inf

`softcap` replaces scores s by `softcap * tanh(s / softcap)`; `sink`, float [num_heads], is the logit of one more
column, whose probability is thrown away. A row that sees no key gives zeros, or with `empty_rows="mean"` the mean
of all values of its kv head. `strategy`, `lnc` and `kernel_name` (ours, or one of the SDK's by its name in
`kernels.vendor.ADAPTERS`; Inductor takes `kernel` for itself) say what to launch and how, and change no number;
STRIDED_CONTEXT_PARALLEL_KERNEL promises that the mask is bounds alone, and row i ends with key
`i * (kv_len // q_len) + rank`. `orders` says how query, key, value and the result lie, each in an order of
`kernels.orders.ORDERS`: "BSHD,BSHD,BSHD,BSHD" has all of them as [batch, length, heads, dim].

Arguments that do not fit raise `InputError`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuron_attn_rewrite.kernels import cpu, reference, vendor
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, ORDERS, PLAIN, Orders, turned
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import How, Launch, nki_jit
from neuron_attn_rewrite.ops import launch, paged, prior, simulated
from neuron_attn_rewrite.ops.arguments import UNSHARDED, check, orders_of

TERMS = (
    "float scale, int? band_lower=None, int? band_upper=None, Tensor? key_padding=None, Tensor? bounds=None, "
    'Tensor? bias=None, float? softcap=None, Tensor? sink=None, str empty_rows="zero"'
)
_untyped: Any = torch.library
LIBRARY = _untyped.Library("neuron_attn", "DEF")
LIBRARY.define(
    f"flash_fwd(Tensor query, Tensor key, Tensor value, *, {TERMS}, "
    'str strategy="UNSHARDED_KERNEL", int lnc=1, str kernel_name="flash_fwd", '
    'str orders="BHSD,BHSD,BHSD,BHSD") -> Tensor',
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    f"flash_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, *, {TERMS}, bool bias_grad=False, int lnc=1)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


TENSORS = ("bias", "sink", "key_padding", "bounds")
"""Tensors among the options."""

Computed: TypeAlias = Callable[[Tensor, Tensor, Tensor, Terms], Tensor]


def _in_order(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], compute: Computed) -> Tensor:
    """What `compute` gives for operands in the order of the op's words, put into the order that was asked for."""
    orders = orders_of(options)
    plain = orders.to(AS_GIVEN, query, key, value)
    out = compute(*plain, check(*plain, **options))
    return turned(out, PLAIN, orders.result).contiguous()


def _result(query: Tensor, value: Tensor, orders: Orders) -> list[int]:
    """The shape of the result, for operands in the order of the op's words."""
    shape = (*query.shape[:3], value.shape[3])
    return [shape[i] for i in ORDERS[orders.result]]


def _fake(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    orders = orders_of(options)
    plain = orders.to(AS_GIVEN, query, key, value)
    check(*plain, **options)
    # Made as it lies: to turn it and ask whether it is contiguous would be a guard on sizes that are symbols.
    return query.new_empty(_result(plain[0], plain[2], orders))


def _cpu(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    target = simulated.simulating()
    if target is not None and query.numel() and value.numel():
        orders = orders_of(options)
        terms = check(*orders.to(AS_GIVEN, query, key, value), **options)
        how = {name: options[name] for name in ("strategy", "lnc") if name in options}
        launch = prepare.flash_fwd(query, key, value, terms, **how, target=target, orders=orders)
        return cast(Tensor, simulated.run(launch, target)[0]).contiguous()
    return _in_order(query, key, value, options, cpu.attention)


def _decomposed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _in_order(query, key, value, options, reference.attention)


def forward_on_device(
    query: Tensor, key: Tensor, value: Tensor, *, launcher: Launch = nki_jit, **options: Any
) -> Tensor:
    """`flash_fwd` by the kernel that was chosen."""
    orders = orders_of(options)
    terms = check(*orders.to(AS_GIVEN, query, key, value), **options)
    how = How(options.get("lnc", 1), options.get("strategy", UNSHARDED), orders)
    return launch.launch(query, key, value, terms, options.get("kernel_name", "flash_fwd"), how, launcher)


def _xla(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    orders = orders_of(options)
    plain = orders.to(AS_GIVEN, query, key, value)
    check(*plain, **options)
    return launch.on_xla(
        options.get("kernel_name", "flash_fwd"),
        (query, key, value),
        options,
        result=_result(plain[0], plain[2], orders),
        launched=lambda: forward_on_device(query, key, value, **options),
        decomposed=lambda: _decomposed(query, key, value, **options),
    )


def _autograd(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    bias, sink = options.get("bias"), options.get("sink")
    if any(map(_has_tangent, (query, key, value, bias, sink))):
        return _decomposed(query, key, value, **options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias, sink)):
        result: Tensor = cast(Any, _Attention).apply(query, key, value, bias, sink, options)
        return result
    return _below_autograd(query, key, value, options)


def _below_autograd(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.neuron_attn.flash_fwd.default(query, key, value, **options)
        return result


def _has_tangent(tensor: Tensor | None) -> bool:
    """Whether a derivative is computed forwards from this tensor, as by torch.func.jvp."""
    inside = getattr(forward_ad, "_current_level", -1) >= 0
    return tensor is not None and inside and cast(Any, forward_ad).unpack_dual(tensor).tangent is not None


def _autocast(device: str, key_set: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Operators in front may leave operands of two dtypes: they get that of autocast. Those of one are left alone."""
    operands = (query, key, value)
    if len({t.dtype for t in operands} - {torch.float64}) > 1:
        operands = tuple(t.to(torch.get_autocast_dtype(device)) for t in operands)  # type: ignore[assignment]
    with torch._C._ExcludeDispatchKeyGuard(key_set):
        result: Tensor = torch.ops.neuron_attn.flash_fwd.default(*operands, **options)
        return result


class _Attention(torch.autograd.Function):
    """`flash_fwd`, with `flash_bwd` for its gradients; where those are to have gradients, they are plain operators."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias, sink, options.get("key_padding"), options.get("bounds"))
        ctx.numbers = {k: v for k, v in options.items() if k not in (*TENSORS, "strategy", "kernel_name", "orders")}
        ctx.orders = orders_of(options)
        return _below_autograd(query, key, value, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, key_padding, bounds = ctx.saved_tensors
        needed, orders = ctx.needs_input_grad, ctx.orders
        if torch.is_grad_enabled():
            terms = dict(zip(TENSORS, (bias, sink, key_padding, bounds), strict=True))
            out = _decomposed(query, key, value, **ctx.numbers, **terms, orders=str(orders))
            wanted = [t for t, is_needed in zip(ctx.saved_tensors[:5], needed, strict=False) if is_needed]
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            return (*(next(found) if is_needed else None for is_needed in needed[:5]), None)
        query, key, value = orders.to(AS_GIVEN, query, key, value)
        grad = turned(grad, orders.result, PLAIN)
        grads = torch.ops.neuron_attn.flash_bwd.default(
            grad,
            query,
            key,
            value,
            **ctx.numbers,
            key_padding=key_padding,
            bounds=bounds,
            bias=bias,
            sink=sink,
            bias_grad=needed[3],
        )
        grads = (*AS_GIVEN.to(orders, *grads[:3]), *grads[3:])
        return (*(g if wanted else None for g, wanted in zip(grads, needed, strict=False)), None)


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    terms = check(query, key, value, **options)
    bias = terms.bias if bias_grad else None
    # An op cannot return an optional tensor: the gradient of an absent operand has no elements.
    return tuple(
        query.new_empty(0) if t is None else t.new_empty(t.shape) for t in (query, key, value, bias, terms.sink)
    )


def _backward_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    terms = check(query, key, value, **options)
    return _like_operands(cpu.attention_backward(grad, query, key, value, terms, bias_grad), query, terms)


def backward_decomposed(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """`flash_bwd` as plain torch operators."""
    terms = check(query, key, value, **options)
    by_query, by_key, by_value, by_bias, by_sink = reference.attention_backward(grad, query, key, value, terms)
    by_bias = by_bias if bias_grad else query.new_empty(0)
    return _like_operands((by_query, by_key, by_value, by_bias, by_sink), query, terms)


def backward_on_device(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias_grad: bool = False,
    launcher: Launch = nki_jit,
    **options: Any,
) -> tuple[Tensor, ...]:
    """`flash_bwd` by a kernel of the SDK where one can compute it, else as plain torch operators."""
    terms = check(query, key, value, **options)
    grads = launch.backward(grad, query, key, value, terms, options.get("lnc", 1), launcher)
    if grads is None:
        return backward_decomposed(grad, query, key, value, bias_grad=bias_grad, **options)
    return _like_operands(grads, query, terms)


def _like_operands(grads: tuple[Tensor, ...], query: Tensor, terms: Terms) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of what they belong to."""
    operands = (query, query, query, terms.bias, terms.sink)
    return tuple(
        grad.to(query.dtype if operand is None or not grad.numel() else operand.dtype).contiguous()
        for grad, operand in zip(grads, operands, strict=True)
    )


LIBRARY.impl("flash_fwd", _autograd, "Autograd")
LIBRARY.impl("flash_fwd", _xla, "XLA")
for _device in ("CPU", "CUDA", "XLA"):
    _keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{_device}"))
    LIBRARY.impl("flash_fwd", partial(_autocast, _device.lower(), _keys), f"Autocast{_device}")
LIBRARY.impl("flash_bwd", backward_on_device, "XLA")
for _op, _on_cpu, _elsewhere, _meta in (
    ("flash_fwd", _cpu, _decomposed, _fake),
    ("flash_bwd", _backward_cpu, backward_decomposed, _backward_fake),
):
    LIBRARY.impl(_op, _on_cpu, "CPU")
    # Every other device.
    LIBRARY.impl(_op, _elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuron_attn::{_op}", _meta, lib=LIBRARY)


def _register(op: ModuleType) -> None:
    """An op of inference beside `flash_fwd`, which shares its operands' rules: `prior` and `paged` say what it is."""
    LIBRARY.define(op.NAME + op.SCHEMA, tags=torch.Tag.pt2_compliant_tag)

    def checked(*tensors: Tensor, **options: Any) -> None:
        shared = {name: options[name] for name in ("scale", "softcap", "sink", "lnc") if name in options}
        check(*tensors[:3], **shared, op=op.NAME)
        op.check(*tensors, **options)

    def fake(*tensors: Tensor, **options: Any) -> Tensor:
        checked(*tensors, **options)
        return tensors[0].new_empty(*tensors[0].shape[:3], tensors[2].shape[3])

    def on_cpu(*tensors: Tensor, **options: Any) -> Tensor:
        checked(*tensors, **options)
        if (target := simulated.simulating()) is not None and tensors[0].numel():
            return cast(Tensor, simulated.run(op.launch(*tensors, **options, target=target), target)[0])
        return cast(Tensor, op.on_cpu(*tensors, **options))

    def decomposed(*tensors: Tensor, **options: Any) -> Tensor:
        checked(*tensors, **options)
        return cast(Tensor, op.decomposed(*tensors, **options))

    def launched(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
        kernel = options.get("kernel_name", op.NAME)
        if kernel == op.NAME:
            return launch.run(op.launch(*tensors, **options, target=launch.generation()))
        terms = Terms(options["scale"], softcap=options.get("softcap"), sink=options.get("sink"))
        return cast(Tensor, vendor.require(kernel).call(*tensors, terms, options.get("lnc", 1)))

    def on_xla(*tensors: Tensor, **options: Any) -> Tensor:
        checked(*tensors, **options)
        return launch.on_xla(
            op.NAME,
            tensors,
            options,
            result=(*tensors[0].shape[:3], tensors[2].shape[3]),
            launched=lambda: launched(tensors, options),
            decomposed=lambda: cast(Tensor, op.decomposed(*tensors, **options)),
        )

    LIBRARY.impl(op.NAME, on_cpu, "CPU")
    LIBRARY.impl(op.NAME, on_xla, "XLA")
    LIBRARY.impl(op.NAME, decomposed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuron_attn::{op.NAME}", fake, lib=LIBRARY)


for _module in (prior, paged):
    _register(_module)
