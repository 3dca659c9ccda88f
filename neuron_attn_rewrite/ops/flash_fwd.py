"""`neuron_attn::flash_fwd`, one attention, and `neuron_attn::flash_bwd`, its gradients, on each device.

    softmax(softcap(scale * query key^T) + bias, sink) value

query is [batch, num_heads, q_len, head_dim], key [batch, num_kv_heads, kv_len, head_dim] and value [batch,
num_kv_heads, kv_len, v_head_dim], of one floating dtype and with any strides. Query head h reads kv head
`h // (num_heads // num_kv_heads)`. The result is [batch, num_heads, q_len, v_head_dim], contiguous, in query's
dtype; scores and softmax are float32 (float64 for float64).

Query row i of batch element b sees key j if all of these hold that are given:

* `i + band_lower <= j`, `j <= i + band_upper`
* `key_padding[b, j]`, bool [batch | 1, kv_len]
* `bounds[b, i, 0] <= j < bounds[b, i, 1]`, int [batch | 1, q_len, 2]
* the bias, float [batch | 1, num_heads | 1, q_len | 1, kv_len | 1], is not -inf

`softcap` replaces scores s by `softcap * tanh(s / softcap)`. `sink`, float [num_heads], is the logit of one more
column, whose probability is dropped. A row that sees no key gives zeros, or with `empty_rows="mean"` the mean of all
values of its kv head.

`strategy`, `lnc` and `kernel_name` say which kernel runs and how. They change no number. `kernel_name` is "flash_fwd"
(ours) or a name in `kernels.vendor.ADAPTERS`; it is not called `kernel`, because Inductor uses that name itself.
STRIDED_CONTEXT_PARALLEL_KERNEL requires that the mask is bounds alone, and that row i ends with key
`i * (kv_len // q_len) + rank`. `orders` gives the order of the dims of query, key, value and result, each a name in
`kernels.orders.ORDERS`: "BSHD,BSHD,BSHD,BSHD" has all of them as [batch, length, heads, dim].

`flash_bwd` recomputes the scores. On a Neuron device it runs a kernel of the SDK (`kernels.vendor.BACKWARD`), if one
is installed that can compute the gradients.

Arguments that do not fit raise `InputError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neuron_attn_rewrite.kernels import cpu, reference
from neuron_attn_rewrite.kernels.nki import prepare
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, ORDERS, PLAIN, Orders, turned
from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.kernels.vendor.adapter import Launch, nki_jit
from neuron_attn_rewrite.ops import launch, simulated
from neuron_attn_rewrite.ops.arguments import Choice, check, check_grad, check_plain, checked_terms, split

TENSORS = ("bias", "sink", "key_padding", "bounds")
"""The keyword arguments that are tensors. The first two have gradients."""

Computed: TypeAlias = Callable[[Tensor, Tensor, Tensor, Terms], Tensor]


def _checked(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], Terms, Choice]:
    """The operands as [batch, heads, length, dim], and the keyword arguments, all of them checked."""
    terms, choice = split(options)
    check_plain("flash_fwd", query=query, key=key, value=value)
    plain = choice.how.orders.to(AS_GIVEN, query, key, value)
    return plain, check(*plain, terms, choice), choice


def _in_order(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], compute: Computed) -> Tensor:
    """What `compute` gives for operands as [batch, heads, length, dim], in the order that was asked for."""
    plain, terms, choice = _checked(query, key, value, options)
    return turned(compute(*plain, terms), PLAIN, choice.how.orders.result).contiguous()


def _result_shape(plain: tuple[Tensor, Tensor, Tensor], orders: Orders) -> list[int]:
    query, _, value = plain
    shape = (*query.shape[:3], value.shape[3])
    return [shape[i] for i in ORDERS[orders.result]]


def fake_forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The result of `flash_fwd` without its values."""
    plain, _, choice = _checked(query, key, value, options)
    # Made in its final order: permute and contiguous would add a guard on sizes that are symbols.
    return query.new_empty(_result_shape(plain, choice.how.orders))


def forward_on_cpu(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flash_fwd` on the CPU, or its NKI kernel on the simulator."""
    target = simulated.simulating()
    if target is None or not query.numel() or not value.numel():
        return _in_order(query, key, value, options, cpu.attention)
    _, terms, choice = _checked(query, key, value, options)
    how = choice.how
    launch = prepare.flash_fwd(
        query, key, value, terms, strategy=how.strategy, lnc=how.lnc, target=target, orders=how.orders
    )
    return cast(Tensor, simulated.run(launch, target)[0]).contiguous()


def forward_decomposed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flash_fwd` as plain torch operators."""
    return _in_order(query, key, value, options, reference.attention)


def forward_on_device(
    query: Tensor, key: Tensor, value: Tensor, *, launcher: Launch = nki_jit, **options: Any
) -> Tensor:
    """`flash_fwd` by the kernel that was chosen."""
    _, terms, choice = _checked(query, key, value, options)
    return launch.launch(query, key, value, terms, choice.kernel_name, choice.how, launcher)


def forward_on_xla(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flash_fwd` on XLA tensors."""
    plain, _, choice = _checked(query, key, value, options)
    return launch.on_xla(
        choice.kernel_name,
        (query, key, value),
        options,
        result=_result_shape(plain, choice.how.orders),
        launched=lambda: forward_on_device(query, key, value, **options),
        decomposed=lambda: forward_decomposed(query, key, value, **options),
    )


def forward_with_gradients(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flash_fwd` while autograd records: its gradients are `flash_bwd`."""
    bias, sink = options.get("bias"), options.get("sink")
    if any(map(has_tangent, (query, key, value, bias, sink))):
        return forward_decomposed(query, key, value, **options)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias, sink)):
        result: Tensor = cast(Any, _Attention).apply(query, key, value, bias, sink, options)
        return result
    return _below_autograd(query, key, value, options)


def _below_autograd(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        result: Tensor = torch.ops.neuron_attn.flash_fwd.default(query, key, value, **options)
        return result


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation, as in torch.func.jvp, runs through this tensor."""
    inside = getattr(forward_ad, "_current_level", -1) >= 0
    return tensor is not None and inside and cast(Any, forward_ad).unpack_dual(tensor).tangent is not None


def forward_in_autocast(device: str, key_set: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`flash_fwd` under autocast. Only operands of different dtypes are cast."""
    operands = (query, key, value)
    if len({t.dtype for t in operands} - {torch.float64}) > 1:
        operands = tuple(t.to(torch.get_autocast_dtype(device)) for t in operands)  # type: ignore[assignment]
    with torch._C._ExcludeDispatchKeyGuard(key_set):
        result: Tensor = torch.ops.neuron_attn.flash_fwd.default(*operands, **options)
        return result


class _Attention(torch.autograd.Function):
    """`flash_fwd` with `flash_bwd` as its gradients. For second derivatives the gradients are plain operators."""

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
        ctx.orders = split(options)[1].how.orders
        return _below_autograd(query, key, value, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, key_padding, bounds = ctx.saved_tensors
        needed, orders = ctx.needs_input_grad, ctx.orders
        if torch.is_grad_enabled():
            terms = dict(zip(TENSORS, (bias, sink, key_padding, bounds), strict=True))
            out = forward_decomposed(query, key, value, **ctx.numbers, **terms, orders=str(orders))
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


def _checked_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Terms:
    terms = checked_terms(query, key, value, op="flash_bwd", **options)
    check_grad(grad, query, value)
    return terms


def fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """The results of `flash_bwd` without their values."""
    terms = _checked_backward(grad, query, key, value, options)
    bias = terms.bias if bias_grad else None
    # An op cannot return an optional tensor: the gradient of an absent operand has no elements.
    return tuple(
        query.new_empty(0) if t is None else t.new_empty(t.shape) for t in (query, key, value, bias, terms.sink)
    )


def backward_on_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """`flash_bwd` on the CPU."""
    terms = _checked_backward(grad, query, key, value, options)
    return _like_operands(cpu.attention_backward(grad, query, key, value, terms, bias_grad), query, terms)


def backward_decomposed(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *, bias_grad: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """`flash_bwd` as plain torch operators."""
    terms = _checked_backward(grad, query, key, value, options)
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
    terms = _checked_backward(grad, query, key, value, options)
    grads = launch.backward(grad, query, key, value, terms, split(options)[1].lnc, launcher)
    if grads is None:
        return backward_decomposed(grad, query, key, value, bias_grad=bias_grad, **options)
    return _like_operands(grads, query, terms)


def _like_operands(grads: tuple[Tensor, ...], query: Tensor, terms: Terms) -> tuple[Tensor, ...]:
    """Each gradient in the dtype of its operand, contiguous."""
    operands = (query, query, query, terms.bias, terms.sink)
    return tuple(
        grad.to(query.dtype if operand is None or not grad.numel() else operand.dtype).contiguous()
        for grad, operand in zip(grads, operands, strict=True)
    )
