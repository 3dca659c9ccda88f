"""Instructions of the vector engine that reduce along the free dimensions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from neuron_attn_rewrite.simulator.machine.dtypes import dtype
from neuron_attn_rewrite.simulator.machine.operators import OPERATORS, Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.activations import read_out, reduce_into
from neuron_attn_rewrite.simulator.nki.isa.elementwise import _integers, apply_alu
from neuron_attn_rewrite.simulator.nki.isa.enums import reduce_cmd
from neuron_attn_rewrite.simulator.nki.isa.rules import Issue, free_elements, issue, operator, require_tensor

FP32_MIN = -3.4028234663852886e38
_COMPARISONS = ("equal", "less", "less_equal", "greater", "greater_equal")


def tensor_reduce(
    dst: NkiTensor,
    op: Operator,
    data: NkiTensor,
    axis: int | tuple[int, ...] | list[int],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """dst = data reduced by op over the last free dimensions, from axis on; times -1 with `negate`."""
    i = issue("tensor_reduce", name, dst=dst, data=data)
    require_tensor(i, dst=dst, data=data)
    data, dst = i.operands["data"], i.operands["dst"]
    axes = sorted([axis] if isinstance(axis, int) else axis)
    if not axes or axes[0] <= 0 or axes != list(range(axes[0], data.ndim)):
        i.fail(f"axis {axis} of {list(data.shape)}: it must be the last free dimensions, without a gap")
    reducer = operator(i, "op", op, "reduce")
    kept = math.prod(data.shape[1 : axes[0]])
    if dst.shape[0] != data.shape[0] or free_elements(dst) != kept:
        i.fail(
            f"dst {list(dst.shape)} must have {data.shape[0]} partitions of {kept} elements for data {list(data.shape)}"
        )
    assert reducer.reduce is not None
    if reducer.bits is not None:
        _integers(i, "dst", "data")
        if negate:
            i.fail(f"negate only goes with arithmetic operators, not {op!r}")
        i.write_raw("dst", reducer.reduce(i.read_raw("data").reshape(data.shape[0], kept, -1)).reshape(dst.shape))
    else:
        y = reducer.reduce(i.read("data").reshape(data.shape[0], kept, -1))[..., 0]
        i.write("dst", -y if negate else y)
    i.record()


def tensor_scalar_reduce(
    dst: NkiTensor,
    data: NkiTensor,
    op0: Operator,
    operand0: float | NkiTensor | None,
    reduce_op: Operator,
    reduce_res: NkiTensor | None = None,
    reverse0: bool = False,
    reduce_cmd: reduce_cmd = reduce_cmd.reset_reduce,
    reduce_init: float | NkiTensor | None = None,
    reduce_res_negate: bool = False,
    name: str | None = None,
) -> None:
    """dst = data op0 operand0. The registers reduce it over the free dimensions."""
    i = issue(
        "tensor_scalar_reduce",
        name,
        dst=dst,
        data=data,
        operand0=operand0,
        reduce_res=reduce_res,
        reduce_init=reduce_init,
    )
    require_tensor(i, dst=dst, data=data)
    if reverse0:
        i.fail("the documentation says that reverse0 is not supported yet")
    total = operator(i, "reduce_op", reduce_op, "reduce")
    if total.identity is None:
        i.fail(f"reduce_op must be add, multiply, maximum or minimum, not {reduce_op!r}")
    y = apply_alu(i, "0", op0, i.read("data"), operand0, False)
    _commands(i, reduce_cmd, "reset_reduce", "reduce", "load_reduce")
    registers = reduce_into(i, i.core.vector, reduce_cmd, total, y, _initial(i, reduce_cmd, reduce_init, "data"))
    i.write("dst", y)
    read_out(i, registers, negate=reduce_res_negate)
    i.record(readout=reduce_res is not None)


def _commands(i: Issue, command: reduce_cmd, *legal: str) -> None:
    if command.name not in legal:
        i.fail(f"reduce_cmd must be {', '.join(legal)}, not {command.name}")


def _initial(i: Issue, command: reduce_cmd, init: Any, like: str) -> Any:
    if command is not reduce_cmd.load_reduce:
        if init is not None and not (isinstance(init, int | float) and init == 0):
            i.fail(f"reduce_init only goes with reduce_cmd.load_reduce, not with {command.name}")
        return None
    if init is None:
        i.fail("reduce_cmd.load_reduce needs reduce_init")
    return i.scalar("reduce_init", init, like)


def range_select(
    dst: NkiTensor,
    on_true_tile: NkiTensor,
    comp_op0: Operator,
    comp_op1: Operator,
    bound0: NkiTensor,
    bound1: NkiTensor,
    reduce_cmd: reduce_cmd = reduce_cmd.reset_reduce,
    reduce_res: NkiTensor | None = None,
    reduce_op: Operator = OPERATORS["maximum"],
    range_start: int = 0,
    on_false_value: float = FP32_MIN,
    name: str | None = None,
) -> None:
    """dst = on_true where (index op0 bound0) and (index op1 bound1), else the minimum of float32.

    index = range_start + the position in the free dimensions. The registers hold the maximum.
    """
    i = issue(
        "range_select",
        name,
        dst=dst,
        on_true_tile=on_true_tile,
        bound0=bound0,
        bound1=bound1,
        reduce_res=reduce_res,
    )
    require_tensor(i, dst=dst, on_true_tile=on_true_tile, bound0=bound0, bound1=bound1)
    _maximum_only(i, reduce_op)
    if np.float32(on_false_value) != np.float32(FP32_MIN):
        i.fail(f"on_false_value must be the minimum of float32 ({FP32_MIN!r}), not {on_false_value!r}")
    if dtype(i.operands["on_true_tile"].dtype).kind != "float":
        i.fail(f"on_true_tile must be of a float dtype, not {i.operands['on_true_tile'].dtype}")
    if isinstance(range_start, bool) or not isinstance(range_start, int | np.integer):
        i.fail(f"range_start must be a compile-time integer, not {range_start!r}")
    for key, op in (("comp_op0", comp_op0), ("comp_op1", comp_op1)):
        if not isinstance(op, Operator) or op.name not in _COMPARISONS:
            i.fail(f"{key} must be one of {', '.join(_COMPARISONS)}, not {op!r}")
    _commands(i, reduce_cmd, "idle", "reset", "reset_reduce", "reduce")
    x = i.read("on_true_tile")
    if range_start < 0 or range_start + x.shape[1] > 2**24:
        i.fail(f"indices {range_start} to {range_start + x.shape[1]}: they must be below 2^24, to be exact in float32")
    index = np.arange(range_start, range_start + x.shape[1], dtype=np.float32)
    lower, upper = (i.scalar(k, b, "on_true_tile") for k, b in (("bound0", bound0), ("bound1", bound1)))
    assert comp_op0.binary is not None and comp_op1.binary is not None
    inside = (comp_op0.binary(index, lower) != 0) & (comp_op1.binary(index, upper) != 0)
    y = np.where(inside, x, np.float32(FP32_MIN))
    _select(i, y, reduce_cmd, reduce_res)


def _maximum_only(i: Issue, op: object) -> None:
    if not isinstance(op, Operator) or op.name != "maximum":
        i.fail(f"reduce_op must be nl.maximum, not {op!r}")


def _select(i: Issue, y: Any, command: reduce_cmd, reduce_res: NkiTensor | None) -> None:
    """Write `y`, and let the registers take its maximum. After `idle` they are unknown."""
    if command is reduce_cmd.idle:
        i.core.vector.op = None
        if reduce_res is not None:
            i.fail("reduce_res with reduce_cmd.idle: nothing was reduced")
    registers = reduce_into(i, i.core.vector, command, OPERATORS["maximum"], y)
    i.write("dst", y)
    read_out(i, registers)
    i.record(readout=reduce_res is not None)


def select_reduce(
    dst: NkiTensor,
    predicate: NkiTensor,
    on_true: NkiTensor,
    on_false: float | NkiTensor,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    reduce_op: Operator = OPERATORS["maximum"],
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """dst = on_true where predicate, else on_false. The registers hold the maximum over the free dimensions."""
    i = issue(
        "select_reduce",
        name,
        dst=dst,
        predicate=predicate,
        on_true=on_true,
        on_false=on_false,
        reduce_res=reduce_res,
    )
    require_tensor(i, dst=dst, predicate=predicate, on_true=on_true)
    _maximum_only(i, reduce_op)
    if i.operands["predicate"].dtype not in ("int8", "uint8", "int16", "uint16"):
        i.fail(f"predicate must be int8, uint8, int16 or uint16, not {i.operands['predicate'].dtype}")
    if i.operands["on_true"].dtype in ("tfloat32", "int32", "uint32"):
        i.fail(f"on_true must not be of {i.operands['on_true'].dtype}")
    _commands(i, reduce_cmd, "idle", "reset_reduce", "reduce")
    chosen = (i.read("predicate") != 0) != bool(reverse_pred)
    y = np.where(chosen, i.read("on_true"), i.scalar("on_false", on_false, "on_true", any_float=True))
    _select(i, y, reduce_cmd, reduce_res)


def exponential(
    dst: NkiTensor,
    src: NkiTensor,
    max_value: float | NkiTensor = 0.0,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    reduce_init: float | NkiTensor = 0.0,
    name: str | None = None,
) -> None:
    """dst = exp(src - max_value). The registers sum it over the free dimensions."""
    i = issue(
        "exponential", name, dst=dst, src=src, max_value=max_value, reduce_res=reduce_res, reduce_init=reduce_init
    )
    require_tensor(i, dst=dst, src=src)
    _commands(i, reduce_cmd, "idle", "reset_reduce", "reduce", "load_reduce")
    y = np.exp(i.read("src") - i.scalar("max_value", max_value, "src"))
    init = _initial(i, reduce_cmd, reduce_init, "src")
    if reduce_cmd.name == "idle":
        i.core.vector.op = None
        if reduce_res is not None:
            i.fail("reduce_res with reduce_cmd.idle: nothing was reduced")
    registers = reduce_into(i, i.core.vector, reduce_cmd, OPERATORS["add"], y, init)
    i.write("dst", y)
    read_out(i, registers)
    i.record(readout=reduce_res is not None)
