"""Instructions of the scalar engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from neuron_attn_rewrite.simulator.machine.core import Accumulator
from neuron_attn_rewrite.simulator.machine.dtypes import Array
from neuron_attn_rewrite.simulator.machine.operators import OPERATORS, Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.enums import reduce_cmd
from neuron_attn_rewrite.simulator.nki.isa.rules import Issue, free_elements, issue, operator, require_tensor


def reduce_into(
    i: Issue,
    registers: Accumulator,
    command: reduce_cmd,
    op: Operator,
    values: Array,
    init: Any = None,
) -> Array:
    """Apply `command` to the registers of the partitions in use, and return them as float32 [partitions, 1]."""
    data = next(t for k, t in i.operands.items() if k != "dst")
    lanes = slice(data.start_partition, data.start_partition + len(values))
    held = registers.values[lanes]
    if command is reduce_cmd.reset:
        held[:] = op.identity
        registers.op = op.name
    elif command in (reduce_cmd.reset_reduce, reduce_cmd.reduce, reduce_cmd.load_reduce):
        assert op.reduce is not None and op.binary is not None
        total = op.reduce(values)
        if command is reduce_cmd.reduce:
            if registers.op != op.name:
                i.fail(f"reduce_cmd.reduce with {op!r}, but the registers hold {registers.op or 'an unknown state'}")
            total = op.binary(held, total)
        elif command is reduce_cmd.load_reduce:
            total = op.binary(init, total)
        held[:] = total
        registers.op = op.name
    return held


def read_out(i: Issue, registers: Array, *, negate: bool = False) -> None:
    """Write the registers to `reduce_res`, if given."""
    result = i.operands.get("reduce_res")
    if result is None:
        return
    if result.shape[0] != len(registers) or free_elements(result) != 1:
        i.fail(f"reduce_res must be a tile of shape ({len(registers)}, 1), not {result!r}")
    i.write("reduce_res", -registers if negate else registers)


def apply_activation(i: Issue, op: object, x: Array) -> Array:
    """The function of the scalar engine. Outside of its range the hardware gives invalid results: an error."""
    f = operator(i, "op", op, "activation")
    assert f.activation is not None
    if f.low > -np.inf:
        size = np.abs(x) if f.signed else x
        if (outside := (size < f.low) | (size > f.high)).any():
            i.fail(
                f"{f!r} of {float(x[outside][0])!r}: it is only defined for "
                f"{'|x|' if f.signed else 'x'} in [{f.low:g}, {f.high:g}]"
            )
    return f.activation(x)


def activation(
    dst: NkiTensor,
    op: Operator,
    data: NkiTensor,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    reduce_op: Operator | None = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    name: str | None = None,
) -> None:
    """dst = op(data * scale + bias) in float32. The registers sum it over the free dimensions, as `reduce_cmd` says."""
    _activation("activation", dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd, name)


def activation_reduce(
    dst: NkiTensor,
    op: Operator,
    data: NkiTensor,
    reduce_op: Operator,
    reduce_res: NkiTensor | None,
    bias: float | NkiTensor | None = None,
    scale: float | NkiTensor = 1.0,
    name: str | None = None,
) -> None:
    """`activation` with `reduce_cmd.reset_reduce`."""
    _activation("activation_reduce", dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd.reset_reduce, name)


def _activation(
    which: str,
    dst: NkiTensor,
    op: Operator,
    data: NkiTensor,
    bias: float | NkiTensor | None,
    scale: float | NkiTensor,
    reduce_op: Operator | None,
    reduce_res: NkiTensor | None,
    command: reduce_cmd,
    name: str | None,
) -> None:
    i = issue(which, name, dst=dst, data=data, bias=bias, scale=scale, reduce_res=reduce_res)
    require_tensor(i, dst=dst, data=data)
    x = i.read("data")
    factor = i.scalar("scale", scale, "data")
    if isinstance(scale, NkiTensor) or factor != 1:
        x = x * factor
    if bias is not None:
        if not isinstance(bias, NkiTensor) and i.core.target.generation < 3:
            i.fail("bias must be a tile of shape (partitions, 1) on gen2: numbers need gen3")
        if isinstance(bias, NkiTensor) and bias.dtype == "tfloat32":
            i.fail("bias must not be tfloat32")
        x = x + i.scalar("bias", bias, "data", any_float=True)
    y = apply_activation(i, op, x)
    if command is not reduce_cmd.idle:
        if reduce_op is None or reduce_op.name != "add":
            i.fail(f"reduce_op must be nl.add, not {reduce_op!r}")
        if command is reduce_cmd.load_reduce:
            i.fail("this instruction has no reduce_cmd.load_reduce")
    registers = reduce_into(i, i.core.scalar, command, OPERATORS["add"], y)
    if reduce_res is not None and i.core.scalar.op is None:
        i.fail("reduce_res reads registers into which nothing was reduced")
    i.write("dst", y)
    read_out(i, registers)
    i.record(readout=reduce_res is not None)


PAIRS = frozenset(
    {
        ("multiply", "add"),
        ("multiply", "subtract"),
        ("multiply", "bypass"),
        ("add", "bypass"),
        ("subtract", "bypass"),
        ("bypass", "bypass"),
    }
)


def activate2(
    dst: NkiTensor,
    op: Operator,
    data: NkiTensor,
    imm0: float | NkiTensor,
    imm1: float | NkiTensor,
    op0: Operator,
    op1: Operator,
    relu_param: float | NkiTensor = 0.0,
    reverse0: bool = False,
    reverse1: bool = False,
    reduce_op: Operator | None = None,
    reduce_res: NkiTensor | None = None,
    reduce_cmd: reduce_cmd = reduce_cmd.idle,
    name: str | None = None,
) -> None:
    """dst = op((data op0 imm0) op1 imm1) in float32. The registers reduce it as in `activation`."""
    i = issue("activate2", name, dst=dst, data=data, imm0=imm0, imm1=imm1, reduce_res=reduce_res)
    require_tensor(i, dst=dst, data=data)
    first, second = operator(i, "op0", op0, "binary"), operator(i, "op1", op1, "binary")
    if (first.name, second.name) not in PAIRS:
        i.fail(f"({first!r}, {second!r}) is not one of its six pairs of operators")
    x = combine(first, i.read("data"), i.scalar("imm0", imm0, "data"), reverse0)
    y = apply_activation(i, op, combine(second, x, i.scalar("imm1", imm1, "data"), reverse1))
    total = operator(i, "reduce_op", reduce_op, "reduce") if reduce_op is not None else OPERATORS["add"]
    registers = reduce_into(i, i.core.scalar, reduce_cmd, total, y)
    i.write("dst", y)
    read_out(i, registers)
    i.record(readout=reduce_res is not None)


def combine(op: Operator, x: Any, y: Any, reverse: bool = False) -> Any:
    """`x op y`, or `y op x`."""
    assert op.binary is not None
    return op.binary(y, x) if reverse else op.binary(x, y)
