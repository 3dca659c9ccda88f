"""Registers the attention ops `torch.ops.neuron_attn.*`. Importing it is enough."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from neuron_attn_rewrite.kernels.reference import Terms
from neuron_attn_rewrite.ops import blocks, flash_fwd, paged, prior
from neuron_attn_rewrite.ops.arguments import Choice, schema
from neuron_attn_rewrite.ops.cached import CachedOp

_untyped: Any = torch.library
LIBRARY = _untyped.Library("neuron_attn", "DEF")


def _define(declaration: str) -> None:
    LIBRARY.define(declaration, tags=torch.Tag.pt2_compliant_tag)


def _implement(op: str, on_cpu: Any, elsewhere: Any, fake: Any, on_xla: Any) -> None:
    """Register an op on the CPU, on XLA, on every other device, and without values."""
    LIBRARY.impl(op, on_cpu, "CPU")
    LIBRARY.impl(op, on_xla, "XLA")
    LIBRARY.impl(op, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neuron_attn::{op}", fake, lib=LIBRARY)


_define(f"flash_fwd(Tensor query, Tensor key, Tensor value, *, {schema(Terms, Choice)}) -> Tensor")
_define(
    f"flash_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, *, {schema(Terms)}, bool bias_grad=False, "
    "int lnc=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_implement(
    "flash_fwd",
    flash_fwd.forward_on_cpu,
    flash_fwd.forward_decomposed,
    flash_fwd.fake_forward,
    flash_fwd.forward_on_xla,
)
_implement(
    "flash_bwd",
    flash_fwd.backward_on_cpu,
    flash_fwd.backward_decomposed,
    flash_fwd.fake_backward,
    flash_fwd.backward_on_device,
)
LIBRARY.impl("flash_fwd", flash_fwd.forward_with_gradients, "Autograd")
_PRIOR, BLOCKS = CachedOp(prior.NAME, prior.FlashPrior), CachedOp(blocks.NAME, blocks.FlashBlocks)
for _op in (_PRIOR, CachedOp(paged.NAME, paged.FlashPaged), BLOCKS):
    _define(f"{_op.name}({schema(_op.arguments)}) -> Tensor")
    _implement(_op.name, _op.on_cpu, _op.decomposed, _op.fake, _op.on_xla)
for _op in (_PRIOR, BLOCKS):
    LIBRARY.impl(_op.name, _op.with_gradients, "Autograd")
for _device in ("CPU", "CUDA", "XLA"):
    _keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(f"Autocast{_device}"))
    LIBRARY.impl("flash_fwd", partial(flash_fwd.forward_in_autocast, _device.lower(), _keys), f"Autocast{_device}")
    LIBRARY.impl(_PRIOR.name, partial(_PRIOR.in_autocast, _device.lower(), _keys), f"Autocast{_device}")
_define("checked_blocks(Tensor block_table, SymInt blocks, bool wraps=False) -> Tensor")
_implement("checked_blocks", *(blocks.checked_blocks,) * 2, blocks.fake_checked_blocks, blocks.checked_blocks)
