"""The documented limits of each instruction, as data, and the checks that all instructions share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

import numpy as np

from neuron_attn_rewrite.errors import SimulatorError
from neuron_attn_rewrite.simulator.machine.core import Core, VirtualRegister, current, register_value
from neuron_attn_rewrite.simulator.machine.dtypes import Array, dtype
from neuron_attn_rewrite.simulator.machine.memory import HBM, ON_CHIP, PSUM, SBUF, MemoryRegion, check_start
from neuron_attn_rewrite.simulator.machine.operators import Operator
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.enums import engine
from neuron_attn_rewrite.simulator.trace import Instruction

ANYWHERE = (*ON_CHIP, *HBM)
NOT_PSUM = (SBUF, *HBM)
ONLY_SBUF, ONLY_PSUM = (SBUF,), (PSUM,)
PE, ACT, DVE, POOL, DMA = engine.tensor, engine.scalar, engine.vector, engine.gpsimd, engine.dma


@dataclass(frozen=True)
class Rule:
    """The limits of one instruction.

    `engines`: the engines that have it, the default first. `operands`: where each operand may be. `since`: the first
    generation that has it. `together`: operands of which only one may be in PSUM. `same_size`: operands with equally
    many partitions and elements per partition. `same_dtype`: operands of one dtype.
    """

    engines: tuple[engine, ...]
    operands: Mapping[str, tuple[MemoryRegion, ...]]
    since: int = 2
    together: tuple[str, ...] = ()
    same_size: tuple[str, ...] = ()
    same_dtype: tuple[str, ...] = ()


def _on_chip(*names: str) -> dict[str, tuple[MemoryRegion, ...]]:
    return dict.fromkeys(names, ON_CHIP)


RULES: dict[str, Rule] = {
    "nc_matmul": Rule((PE,), {"dst": ONLY_PSUM, "stationary": ONLY_SBUF, "moving": ONLY_SBUF}),
    "nc_transpose": Rule((PE, DVE), _on_chip("dst", "data"), same_dtype=("dst", "data")),
    "activation": Rule((ACT,), _on_chip("dst", "data", "bias", "scale", "reduce_res"), same_size=("dst", "data")),
    "activation_reduce": Rule(
        (ACT,), _on_chip("dst", "data", "bias", "scale", "reduce_res"), same_size=("dst", "data")
    ),
    "activate2": Rule(
        (ACT,), _on_chip("dst", "data", "imm0", "imm1", "relu_param", "reduce_res"), since=4, same_size=("dst", "data")
    ),
    "tensor_copy": Rule((DVE, ACT, POOL), _on_chip("dst", "src"), same_size=("dst", "src")),
    "tensor_copy_predicated": Rule(
        (DVE,),
        _on_chip("dst", "src", "predicate"),
        together=("src", "predicate"),
        same_size=("dst", "src", "predicate"),
        same_dtype=("dst", "src"),
    ),
    "memset": Rule((DVE, POOL), _on_chip("dst")),
    "tensor_tensor": Rule(
        (DVE, POOL),
        _on_chip("dst", "data1", "data2"),
        together=("data1", "data2"),
        same_size=("dst", "data1", "data2"),
    ),
    "tensor_scalar": Rule((DVE, ACT, POOL), _on_chip("dst", "data", "operand0", "operand1"), same_size=("dst", "data")),
    "scalar_tensor_tensor": Rule(
        (DVE,),
        _on_chip("dst", "data", "operand0", "operand1"),
        together=("data", "operand1"),
        same_size=("dst", "data", "operand1"),
    ),
    "tensor_scalar_reduce": Rule(
        (DVE,), _on_chip("dst", "data", "operand0", "reduce_res", "reduce_init"), same_size=("dst", "data")
    ),
    "tensor_reduce": Rule((DVE,), _on_chip("dst", "data")),
    "tensor_tensor_scan": Rule(
        (DVE,),
        _on_chip("dst", "data0", "data1", "initial"),
        together=("data0", "data1"),
        same_size=("dst", "data0", "data1"),
    ),
    "range_select": Rule(
        (DVE,),
        _on_chip("dst", "on_true_tile", "bound0", "bound1", "reduce_res"),
        since=3,
        same_size=("dst", "on_true_tile"),
    ),
    "select_reduce": Rule(
        (DVE,),
        _on_chip("dst", "predicate", "on_true", "on_false", "reduce_res"),
        together=("on_true", "predicate"),
        same_size=("dst", "on_true", "predicate"),
    ),
    "reciprocal": Rule((DVE,), _on_chip("dst", "data"), same_size=("dst", "data")),
    "exponential": Rule(
        (DVE,),
        _on_chip("dst", "src", "max_value", "reduce_res", "reduce_init"),
        since=4,
        same_size=("dst", "src"),
    ),
    "nc_stream_shuffle": Rule((DVE,), _on_chip("dst", "src"), same_dtype=("dst", "src")),
    "iota": Rule((POOL,), {"dst": ONLY_SBUF}),
    "affine_select": Rule((POOL,), {"dst": ONLY_SBUF, "on_true_tile": ONLY_SBUF}, same_size=("dst", "on_true_tile")),
    "dma_copy": Rule((DMA,), {"dst": NOT_PSUM, "src": NOT_PSUM}),
    "dma_transpose": Rule((DMA,), {"dst": ONLY_SBUF, "src": NOT_PSUM}, same_dtype=("dst", "src")),
    "dma_compute": Rule((DMA,), {"dst": NOT_PSUM}),
    "sendrecv": Rule(
        (DMA, POOL),
        {"dst": ONLY_SBUF, "src": ONLY_SBUF},
        since=3,
        same_size=("dst", "src"),
        same_dtype=("dst", "src"),
    ),
    "core_barrier": Rule((POOL, PE, ACT, DVE, engine.sync), {"data": (MemoryRegion.shared_hbm,)}, since=3),
    "register_load": Rule((engine.sync,), {"src": NOT_PSUM}),
    "register_store": Rule((engine.sync,), {"dst": NOT_PSUM}),
    "shared_identity_matrix": Rule((DMA,), {"dst": ONLY_SBUF}),
    "shared_constant": Rule((DMA,), {"dst": HBM}),
}


Operand: TypeAlias = "NkiTensor | float | None"


def free_elements(t: NkiTensor) -> int:
    """Elements per partition."""
    return t.size // t.shape[0] if t.storage.on_chip else t.size


def resolve(t: NkiTensor, what: str) -> NkiTensor:
    """The view with its run-time scalar offset added. A vector offset stays: the DMA resolves it."""
    by = t.indirect_by
    if by is None or not by.scalar:
        return t
    offset = t.offset + index_value(by.index, what) * by.stride
    return NkiTensor(t.storage, t.dtype, t.shape, t.strides, offset)


def index_value(index: NkiTensor | VirtualRegister, what: str) -> int:
    if isinstance(index, VirtualRegister):
        return register_value(index, what)
    if index.buffer is not SBUF or index.size != 1:
        raise SimulatorError(f"{what}: a scalar offset must be a register or one element in SBUF, not {index!r}")
    check_written(index, what, "scalar_offset")
    return int(index.array().reshape(()))


def check_written(t: NkiTensor, what: str, key: str, rows: list[int] | None = None) -> None:
    """Check that every element was written, or every element of these rows of dim 0."""
    s = t.storage
    if s.complete or s.bytes.written is None or not current().check_reads:
        return
    marks = t.shadow(s.bytes.written)
    marks = marks if rows is None else marks[rows]
    if not marks.all():
        missing = int(np.count_nonzero(~marks))
        raise SimulatorError(
            f"{what}: {key} reads {t!r}, of which {missing} of {marks.size} elements were never written"
        )


def mark_written(t: NkiTensor, where: Array | None = None) -> None:
    """Mark every element of the view as written, or those where `where`, of the view's shape, is true."""
    s = t.storage
    if s.begun is not None and where is None:
        t.begun()[...] = False
    if s.complete or s.bytes.written is None:
        return
    marks = s.bytes.written
    size, whole = t.size * dtype(t.dtype).itemsize, s.partitions * s.free_bytes
    if where is not None:
        shadow = t.shadow(marks)
        shadow |= where[..., None] if s.bytewise else where
        return
    if s.exclusive and size == whole:
        s.complete = True
        return
    t.shadow(marks)[...] = True
    s.missing -= size
    if s.exclusive and s.missing <= 0:
        step = 1 if s.bytewise else dtype(s.dtype).itemsize
        s.missing = (marks[::step].size - int(np.count_nonzero(marks[::step]))) * step
        s.complete = s.missing == 0


@dataclass
class Issue:
    """One instruction. Its operands have passed the checks that all instructions share."""

    op: str
    rule: Rule
    core: Core
    engine: engine
    name: str | None
    operands: dict[str, NkiTensor] = field(default_factory=dict)

    def fail(self, message: str) -> NoReturn:
        raise SimulatorError(f"nki.isa.{self.op}: {message}")

    def read_raw(self, key: str) -> Array:
        """The operand as it is stored."""
        t = self.operands[key]
        check_written(t, f"nki.isa.{self.op}", key)
        return t.array()

    def read(self, key: str) -> Array:
        """An on-chip operand as float32 [partitions, elements per partition]."""
        t = self.operands[key]
        return dtype(t.dtype).load(self.read_raw(key)).reshape(t.shape[0], -1)

    def write_raw(self, key: str, value: Array) -> None:
        t = self.operands[key]
        t.array()[...] = value
        mark_written(t)

    def write(self, key: str, value: Array) -> None:
        """Write float32 [partitions, elements per partition], cast to the dtype of the operand."""
        t = self.operands[key]
        self.write_raw(key, dtype(t.dtype).store(np.asarray(value, np.float32)).reshape(t.shape))

    def scalar(self, key: str, value: Operand, like: str, *, any_float: bool = False) -> Any:
        """An operand that is a number or a float32 tile [partitions, 1], as float32."""
        if isinstance(value, NkiTensor):
            t, rows = self.operands[key], self.operands[like].shape[0]
            if t.shape[0] != rows or free_elements(t) != 1:
                self.fail(f"{key} must be a number or a tile of shape ({rows}, 1), not {t!r}")
            if t.dtype != "float32" and not any_float:
                self.fail(f"{key} must be a tile of float32, not of {t.dtype}")
            return self.read(key)
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
            self.fail(f"{key} must be a number or a tile, not {value!r}")
        return np.float32(value)

    def is_int(self, *keys: str) -> bool:
        return all(dtype(self.operands[k].dtype).kind == "int" for k in keys if k in self.operands)

    def record(self, **facts: Any) -> None:
        """Append to the trace."""
        tensors = list(self.operands.values())
        self.core.instructions.append(
            Instruction(
                self.op,
                self.engine.name,
                self.core.id,
                self.name,
                max((t.shape[0] for t in tensors), default=0),
                max((free_elements(t) for t in tensors), default=0),
                tuple(t.dtype for t in tensors),
                tuple(t.storage.where for t in tensors),
                all(t.strides[-1] == 1 or t.shape[-1] == 1 for t in tensors),
                in_loop=self.core.loops > 0,
                **facts,
            )
        )


def issue(op: str, name: str | None, chosen: engine = engine.unknown, /, **operands: Any) -> Issue:
    """Check what all instructions share. The instruction itself checks operands that are not tensors."""
    what = f"nki.isa.{op}"
    core, rule = current(what), RULES[op]
    unit = rule.engines[0] if chosen is engine.unknown else chosen
    self = Issue(op, rule, core, unit, name)
    if core.target.generation < rule.since:
        self.fail(f"it needs gen{rule.since}; the target is {core.target}")
    if unit not in rule.engines:
        self.fail(f"it runs on {' or '.join(e.name for e in rule.engines)}, not on {unit!r}")
    if name is not None:
        if not isinstance(name, str):
            self.fail(f"name={name!r} must be a string")
        if name in core.names and not core.repeated:
            self.fail(f"name {name!r} is taken by an earlier instruction: names must be unique")
        core.names.add(name)
    for key, t in operands.items():
        if isinstance(t, NkiTensor):
            self.operands[key] = _checked(self, key, t)
        elif t is None and key == "dst":
            self.fail("dst is missing: it is the first argument, and instructions return nothing")
    _check_together(self)
    return self


def _checked(self: Issue, key: str, t: NkiTensor) -> NkiTensor:
    what = f"nki.isa.{self.op}"
    regions = self.rule.operands[key]
    region = t.storage.region
    if region not in regions:
        self.fail(f"{key} is in {region.value}; it must be in {', '.join(r.value for r in regions)}")
    if t.indirect_by is not None:
        t = resolve(t, what)
    if self.engine is not DMA and t.storage.on_chip:
        if region is PSUM and self.engine is POOL:
            self.fail(f"{key} is in psum, which the GpSimd engine cannot access")
        if t.shape[0] > 32 or t.offset or t.storage.start_partition:
            check_start(f"{what}: {key}", t.start_partition, t.shape[0])
        if len(t.shape) > 5:
            self.fail(f"{key} has {len(t.shape) - 1} free dimensions: at most 4 are possible")
    if key in ("dst", "reduce_res") and any(k == 0 and n > 1 for k, n in zip(t.strides, t.shape, strict=True)):
        self.fail(f"{key} is broadcast: it cannot be written")
    return t


def _check_together(self: Issue) -> None:
    rule, operands = self.rule, self.operands
    if rule.together and all(k in operands and operands[k].storage.region is PSUM for k in rule.together):
        self.fail(f"{' and '.join(rule.together)} are both in psum: only one of them may be")
    if rule.same_size:
        first = operands.get(rule.same_size[0])
        for key in rule.same_size:
            t = operands.get(key)
            if t is None or t is first or first is None:
                continue
            if t.shape[0] != first.shape[0] or t.size != first.size:
                self.fail(
                    f"{rule.same_size[0]} is {list(first.shape)} and {key} is {list(t.shape)}: both must have "
                    "equally many partitions and elements per partition"
                )
    if rule.same_dtype:
        kinds = {k: operands[k].dtype for k in rule.same_dtype if k in operands}
        if len(set(kinds.values())) > 1:
            self.fail(f"{' and '.join(rule.same_dtype)} must have one dtype, not {' and '.join(kinds.values())}")


def require_tensor(self: Issue, **operands: Any) -> None:
    for key, t in operands.items():
        if key not in self.operands:
            self.fail(f"{key} must be a tensor, not {t!r}")


def operator(self: Issue, key: str, op: object, use: str) -> Operator:
    """The operator, if the hardware has this use of it: "binary", "unary", "bits", "reduce" or "activation"."""
    if not isinstance(op, Operator):
        self.fail(f"{key} must be an operator such as nl.add, not {op!r}")
    if getattr(op, use) is None:
        self.fail(f"{key}={op!r} has no {use} form on this engine")
    return op
