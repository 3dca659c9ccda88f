"""An NKI entry to nkilib's `attention_tkg`, which is no kernel by itself: it wants a configuration, a memory manager
and an output. Importing this needs `nki` and `nkilib`.
"""

from typing import Any

import nki
import nki.isa as nisa
import nki.language as nl
from nkilib.core.attention.attention_tkg import attention_tkg
from nkilib.core.attention.attention_tkg_utils import AttnTKGConfig
from nkilib.core.utils.allocator import SbufManager
from nkilib.core.utils.logging import Logger

COMPILER_SBUF = 16 * 1024
"""Bytes of each partition that are left to the compiler, as in the library's own tests."""


@nki.jit
def attention_tkg_entry(
    q: Any, k_active: Any, v_active: Any, k_prior: Any, v_prior: Any, mask: Any, sink: Any = None
) -> Any:
    """q [d, batch * heads * rows], k_active [d, batch * rows], v_active [batch, 1, rows, d], k_prior and v_prior
    [batch, 1, keys, d], mask [keys, batch, heads, rows], 1 where a key is seen; gives [batch, heads, d, rows].

    The last `rows` keys are the active ones; what k_prior and v_prior hold there is not read.
    """
    keys, batch, heads, rows = mask.shape
    cfg = AttnTKGConfig(
        bs=batch,
        q_head=heads,
        s_active=rows,
        curr_sprior=keys,
        full_sprior=keys,
        d_head=q.shape[0],
        tp_k_prior=True,
        qk_in_sb=True,
    )
    manager = SbufManager(0, nl.tile_size.total_available_sbuf_size - COMPILER_SBUF, Logger("SBM"))
    manager.open_scope()
    q_tile = manager.alloc_stack(q.shape, dtype=q.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=q_tile, src=q)
    k_tile = manager.alloc_stack(k_active.shape, dtype=k_active.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=k_tile, src=k_active)
    out = nl.ndarray((batch, heads, q.shape[0], rows), dtype=q.dtype, buffer=nl.shared_hbm)
    result = attention_tkg(
        q=q_tile,
        k_active=k_tile,
        v_active=v_active,
        k_prior=k_prior,
        v_prior=v_prior,
        mask=mask,
        out=out,
        cfg=cfg,
        sbm=manager,
        sink=sink,
    )
    manager.close_scope()
    return result[0]
