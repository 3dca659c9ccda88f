"""Instructions for registers and for the synchronisation of two cores."""

from __future__ import annotations

import numpy as np

from neuron_attn_rewrite.simulator.machine.core import VirtualRegister, current, register_value, set_register
from neuron_attn_rewrite.simulator.machine.dtypes import dtype
from neuron_attn_rewrite.simulator.machine.tensor import NkiTensor
from neuron_attn_rewrite.simulator.nki.isa.enums import dma_engine, engine, nc_version
from neuron_attn_rewrite.simulator.nki.isa.rules import Issue, issue, require_tensor


def get_nc_version() -> nc_version:
    """The generation of the target."""
    return nc_version(current("nki.isa.get_nc_version").target.generation)


def get_nc_sub_version() -> int:
    return 0


def register_alloc(x: int | None = None) -> VirtualRegister:
    """A new register, with the value `x` if given."""
    current("nki.isa.register_alloc")
    return VirtualRegister(None if x is None else int(x))


def register_move(dst: VirtualRegister, src: int | VirtualRegister) -> None:
    set_register(dst, register_value(src, "nki.isa.register_move") if isinstance(src, VirtualRegister) else int(src))


def register_load(dst: VirtualRegister, src: NkiTensor) -> None:
    i = issue("register_load", None, src=src)
    require_tensor(i, src=src)
    _one_word(i, "src")
    set_register(dst, int(i.read_raw("src").reshape(())))
    i.record()


def register_store(dst: NkiTensor, src: VirtualRegister) -> None:
    i = issue("register_store", None, dst=dst)
    require_tensor(i, dst=dst)
    _one_word(i, "dst")
    value = np.int64(register_value(src, "nki.isa.register_store"))
    i.write_raw("dst", value.astype(dtype(i.operands["dst"].dtype).storage))
    i.record()


def _one_word(i: Issue, key: str) -> None:
    t = i.operands[key]
    if t.size != 1 or dtype(t.dtype).kind == "float":
        i.fail(f"{key} must be one integer, not {t!r}")


def core_barrier(
    data: NkiTensor, cores: tuple[int, ...], engine: engine = engine.gpsimd, name: str | None = None
) -> None:
    """Both cores wait for each other here. `data` is the tensor in shared HBM that they share."""
    i = issue("core_barrier", name, engine, data=data)
    require_tensor(i, data=data)
    if tuple(cores) != (0, 1):
        i.fail(f"cores must be (0, 1), not {cores}")
    i.core.link.meet(i.core.id, ("core_barrier", None), None)
    i.record()


def sendrecv(
    src: NkiTensor,
    dst: NkiTensor,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: dma_engine = dma_engine.dma,
    name: str | None = None,
) -> None:
    """Send `src` to the `dst` of the other core, and receive its `src`. Here `src` is the first argument."""
    gpsimd = dma_engine.name == "gpsimd_dma"
    i = issue("sendrecv", name, engine.gpsimd if gpsimd else engine.dma, dst=dst, src=src)
    require_tensor(i, dst=dst, src=src)
    dst, src = i.operands["dst"], i.operands["src"]
    other = 1 - i.core.id
    if send_to_rank != other or recv_from_rank != other:
        i.fail(f"core {i.core.id} must send to and receive from core {other}, not {send_to_rank} and {recv_from_rank}")
    if dst.shape != src.shape:
        i.fail(f"dst {list(dst.shape)} and src {list(src.shape)} must have one shape")
    item = dtype(src.dtype).itemsize
    size, most = src.size // src.shape[0] * item, 256 * item
    if gpsimd and size > most:
        i.fail(f"gpsimd_dma moves at most {most} bytes per partition of {src.dtype}, not {size}")
    values = i.read_raw("src").copy()
    received = i.core.link.meet(i.core.id, ("sendrecv", pipe_id), values)
    if received.shape != dst.shape or received.dtype != dst.array().dtype:
        i.fail(f"the other core sends {list(received.shape)} of {received.dtype}, but dst is {dst!r}")
    i.write_raw("dst", received)
    i.record(bytes=src.size * item, run=size)
