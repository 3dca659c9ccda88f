"""The arguments of the attention ops. Dataclasses list them once: schemas and checks are made from their fields."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.kernels.orders import AS_GIVEN, ORDERS, Orders
from neuron_attn_rewrite.kernels.reference import Terms, work_dtype
from neuron_attn_rewrite.kernels.vendor.adapter import How

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNSHARDED = FlashAttentionStrategy.UNSHARDED_KERNEL.name
BOUNDS_DTYPES = (torch.int32, torch.int64)
FARTHEST = 2**30
"""A limit of a mask farther away than this hides nothing or everything. Kernels compute with 32 bits."""
KERNELS = ("flash_fwd", *vendor.ADAPTERS)
"""The kernels that `flash_fwd` can launch on a Neuron device: ours, then those of the SDK."""
SCHEMA_TYPES: Mapping[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
}
"""How the schema of an op writes the type of a field."""


@dataclass(frozen=True)
class Choice:
    """The keyword arguments of `flash_fwd` beyond `Terms`: which kernel runs and how. They change no number."""

    strategy: str = UNSHARDED
    lnc: int = 1
    kernel_name: str = "flash_fwd"
    orders: str = str(AS_GIVEN)

    @property
    def how(self) -> How:
        """The same as kernels take it.

        Raises:
            InputError: `orders` names an order that does not exist.
        """
        try:
            return How(self.lnc, self.strategy, Orders.read(self.orders))
        except ValueError:
            known = ", ".join(ORDERS)
            raise InputError(
                f"flash_fwd: orders must be four of {known} between commas, and is {self.orders!r}."
            ) from None


def schema(*arguments: type) -> str:
    """The arguments of an op as its schema declares them: the fields of dataclasses, in order."""
    listed = [p for owner in arguments for p in inspect.signature(owner, eval_str=True).parameters.values()]
    declared = [_declared(parameter) for parameter in listed]
    first = next((i for i, parameter in enumerate(listed) if parameter.kind is parameter.KEYWORD_ONLY), None)
    return ", ".join(declared if first is None else [*declared[:first], "*", *declared[first:]])


def _declared(parameter: inspect.Parameter) -> str:
    """One argument, such as `int? window=None`."""
    declared, default = f"{SCHEMA_TYPES[parameter.annotation]} {parameter.name}", parameter.default
    if default is parameter.empty:
        return declared
    return f'{declared}="{default}"' if isinstance(default, str) else f"{declared}={default!r}"


@cache
def _names(arguments: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(arguments))


def split(options: Mapping[str, Any]) -> tuple[Terms, Choice]:
    """The keyword arguments of `flash_fwd` as its two dataclasses."""
    terms = {name: value for name, value in options.items() if name in _names(Terms)}
    return Terms(**terms), Choice(**{name: value for name, value in options.items() if name not in terms})


def checked_terms(query: Tensor, key: Tensor, value: Tensor, *, op: str = "flash_fwd", **options: Any) -> Terms:
    """The terms among the keyword arguments of `flash_fwd`, as `check` gives them."""
    terms, choice = split(options)
    check_plain(op, query=query, key=key, value=value)
    return check(query, key, value, terms, choice, op)


def check(query: Tensor, key: Tensor, value: Tensor, terms: Terms, choice: Choice, op: str = "flash_fwd") -> Terms:
    """The terms, with limits of the band that are not too far away. Operands are [batch, heads, length, dim].

    No value of a tensor is read.

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
        ("key_padding", terms.key_padding, (batch, kv_len), (torch.bool,), (True, False)),
        ("bounds", terms.bounds, (batch, q_len, 2), BOUNDS_DTYPES, (True, False, False)),
        ("bias", terms.bias, (batch, heads, q_len, kv_len), DTYPES, (True, True, True, True)),
        ("sink", terms.sink, (heads,), DTYPES, (False,)),
    ):
        if operand is None:
            continue
        check_plain(op, **{name: operand})
        if operand.dtype not in dtypes:
            raise _error(op, name, f"must be one of {', '.join(map(str, dtypes))}", operand)
        if operand.dim() != len(full) or any(
            size != wanted and not (may_be_one and size == 1)
            for size, wanted, may_be_one in zip(operand.shape, full, broadcast, strict=True)
        ):
            dims = ", ".join(f"{n} | 1" if one else f"{n}" for n, one in zip(full, broadcast, strict=True))
            raise _error(op, name, f"must be [{dims}]", operand)
    others = {"key_padding": terms.key_padding, "bounds": terms.bounds, "bias": terms.bias, "sink": terms.sink}
    check_devices(op, query, {"key": key, "value": value, **others})
    limits = torch.finfo(work_dtype(query.dtype))
    if not abs(terms.scale) <= limits.max:
        raise InputError(f"{op}: scale must be finite in {limits.dtype}, not {terms.scale}.")
    if terms.softcap is not None and not limits.tiny <= terms.softcap <= limits.max:
        raise InputError(f"{op}: softcap must be positive and finite in {limits.dtype}, not {terms.softcap}.")
    if terms.empty_rows not in ("zero", "mean"):
        raise InputError(f'{op}: empty_rows must be "zero" or "mean", not {terms.empty_rows!r}.')
    if choice.strategy not in FlashAttentionStrategy.__members__ or choice.strategy == FlashAttentionStrategy.NONE.name:
        names = [s.name for s in FlashAttentionStrategy if s is not FlashAttentionStrategy.NONE]
        raise InputError(f"{op}: strategy must be one of {', '.join(names)}, not {choice.strategy!r}.")
    if choice.lnc not in (1, 2):
        raise InputError(f"{op}: lnc must be 1 or 2, not {choice.lnc}.")
    if choice.kernel_name not in KERNELS:
        raise InputError(f"{op}: kernel_name must be one of {', '.join(KERNELS)}, not {choice.kernel_name!r}.")
    if terms.band_lower is terms.band_upper is None:
        return terms
    return replace(terms, band_lower=_near(terms.band_lower), band_upper=_near(terms.band_upper))


def check_plain(op: str, **operands: Any) -> None:
    """Check that every operand is a tensor with strides.

    Raises:
        InputError: one is None, or has another layout; the message names it.
    """
    for name, operand in operands.items():
        if not isinstance(operand, Tensor):
            raise InputError(f"{op}: {name} must be a tensor, not {operand!r:.80}.")
        if operand.layout is not torch.strided:
            raise InputError(f"{op}: {name} must be a dense tensor, but its layout is {operand.layout}.")


def _near(limit: int | None) -> int | None:
    """The same limit of a band, but not farther away than `FARTHEST`."""
    return None if limit is None else max(-FARTHEST, min(limit, FARTHEST))


def check_devices(op: str, query: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check that every operand is where the query is.

    Raises:
        InputError: one is on another device; the message names it.
    """
    for name, operand in others.items():
        if operand is not None and operand.device != query.device:
            raise _error(op, name, f"must be on query's device {query.device}", operand)


def check_grad(grad: Tensor, query: Tensor, value: Tensor) -> None:
    """Check the gradient of the result of `flash_fwd`. Operands are [batch, heads, length, dim].

    Raises:
        InputError: it has another shape, dtype or device than the result.
    """
    check_plain("flash_bwd", grad=grad)
    shape = (*query.shape[:3], value.shape[3])
    if grad.shape != shape or grad.dtype != query.dtype:
        raise _error("flash_bwd", "grad", f"must be {list(shape)}, {query.dtype}", grad)
    check_devices("flash_bwd", query, {"grad": grad})


def readable(*tensors: Tensor | None) -> bool:
    """Whether the values of these tensors can be read without effect: on the CPU, and not while a graph is traced."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return False
    return all(t is None or (t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter)) for t in tensors)


def out_of_range(numbers: Tensor, least: int, end: int) -> int | None:
    """The first of the numbers that is not in [least, end). None if all are.

    It works within transforms of `torch.func` too, where `tolist` fails in older versions of torch.
    """
    if not numbers.numel() or least <= int(numbers.min()) <= int(numbers.max()) < end:
        return None
    return next(number for number in map(int, numbers.flatten()) if not least <= number < end)


def _error(op: str, name: str, rule: str, tensor: Tensor) -> InputError:
    return InputError(f"{op}: {name} {rule}, but it is {list(tensor.shape)}, {tensor.dtype}, on {tensor.device}.")
