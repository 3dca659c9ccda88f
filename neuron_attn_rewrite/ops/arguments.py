"""The rules that the arguments of the attention ops keep, and what they say when one is broken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, ORDERS, Orders
from neuron_attn_rewrite.kernels.reference import Terms

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNSHARDED = FlashAttentionStrategy.UNSHARDED_KERNEL.name
BOUNDS_DTYPES = (torch.int32, torch.int64)
KERNELS = ("flash_fwd", *vendor.ADAPTERS)
"""What the op can launch on a Neuron device: ours, and the SDK's."""


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    band_lower: int | None = None,
    band_upper: int | None = None,
    key_padding: Tensor | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    empty_rows: str = "zero",
    strategy: str = UNSHARDED,
    lnc: int = 1,
    kernel_name: str = "flash_fwd",
    orders: str = str(AS_GIVEN),
    op: str = "flash_fwd",
) -> Terms:
    """The terms among the arguments of `flash_fwd`, its operands turned to the order of its words.

    Raises:
        InputError: an argument does not fit; the message names it.
    """
    for name, tensor, dims in (
        ("query", query, "[batch, num_heads, q_len, head_dim]"),
        ("key", key, "[batch, num_kv_heads, kv_len, head_dim]"),
        ("value", value, "[batch, num_kv_heads, kv_len, v_head_dim]"),
    ):
        if tensor.dim() != 4:
            raise _error(op, name, f"must be {dims}", tensor)
        if tensor.dtype not in DTYPES:
            raise _error(op, name, f"must be one of {', '.join(map(str, DTYPES))}", tensor)
        if tensor.dtype != query.dtype:
            raise _error(op, name, f"must have query's dtype {query.dtype}", tensor)
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    if head_dim == 0:
        raise _error(op, "query", "must have a head_dim of at least 1", query)
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise _error(op, "key", f"must have query's batch {batch} and head_dim {head_dim}", key)
    if kv_heads == 0 or heads % kv_heads:
        raise _error(op, "key", f"must have a number of heads that divides query's {heads}", key)
    if value.shape[:3] != key.shape[:3]:
        raise _error(op, "value", f"must have the batch, heads and length of key, {list(key.shape[:3])}", value)
    for name, operand, full, dtypes, broadcast in (
        ("key_padding", key_padding, (batch, kv_len), (torch.bool,), (True, False)),
        ("bounds", bounds, (batch, q_len, 2), BOUNDS_DTYPES, (True, False, False)),
        ("bias", bias, (batch, heads, q_len, kv_len), DTYPES, (True, True, True, True)),
        ("sink", sink, (heads,), DTYPES, (False,)),
    ):
        if operand is None:
            continue
        if operand.dtype not in dtypes:
            raise _error(op, name, f"must be one of {', '.join(map(str, dtypes))}", operand)
        if operand.dim() != len(full) or any(
            size != wanted and not (may_be_one and size == 1)
            for size, wanted, may_be_one in zip(operand.shape, full, broadcast, strict=True)
        ):
            dims = ", ".join(f"{n} | 1" if one else f"{n}" for n, one in zip(full, broadcast, strict=True))
            raise _error(op, name, f"must be [{dims}]", operand)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:
            raise _error(op, name, f"must be on query's device {query.device}", tensor)
    for name, operand in (("key_padding", key_padding), ("bounds", bounds), ("bias", bias), ("sink", sink)):
        if operand is not None and operand.device != query.device:
            raise _error(op, name, f"must be on query's device {query.device}", operand)
    if not math.isfinite(scale):
        raise InputError(f"{op}: scale must be finite, not {scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InputError(f"{op}: softcap must be positive and finite, not {softcap}.")
    if empty_rows not in ("zero", "mean"):
        raise InputError(f'{op}: empty_rows must be "zero" or "mean", not {empty_rows!r}.')
    if strategy not in FlashAttentionStrategy.__members__ or strategy == FlashAttentionStrategy.NONE.name:
        names = [s.name for s in FlashAttentionStrategy if s is not FlashAttentionStrategy.NONE]
        raise InputError(f"{op}: strategy must be one of {', '.join(names)}, not {strategy!r}.")
    if lnc not in (1, 2):
        raise InputError(f"{op}: lnc must be 1 or 2, not {lnc}.")
    if kernel_name not in KERNELS:
        raise InputError(f"{op}: kernel_name must be one of {', '.join(KERNELS)}, not {kernel_name!r}.")
    return Terms(scale, band_lower, band_upper, key_padding, bounds, bias, softcap, sink, empty_rows)


def _error(op: str, name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"{op}: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}.")


def orders_of(options: Mapping[str, Any], op: str = "flash_fwd") -> Orders:
    """How the operands lie, by the op's keyword arguments.

    Raises:
        InputError: there is no such order.
    """
    text = options.get("orders", str(AS_GIVEN))
    try:
        return Orders.read(text)
    except ValueError:
        known = ", ".join(ORDERS)
        raise InputError(f"{op}: orders must be four of {known} between commas, and is {text!r}.") from None
