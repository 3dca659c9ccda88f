"""The SDK's own attention kernels, unmodified, on the simulator, against their own torch references.

They are somebody else's code and no part of this project: the tests run where NKI_LIBRARY names a checkout of
https://github.com/aws-neuron/nki-library, and count as not run elsewhere.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_attn_rewrite.simulator import active, run
from neuron_attn_rewrite.simulator.nki import language

CHECKOUT = os.environ.get("NKI_LIBRARY", "")
LONGEST = int(os.environ.get("NKI_LIBRARY_LONGEST", "2048"))
if not CHECKOUT:
    pytest.skip("NKI_LIBRARY names no checkout of aws-neuron/nki-library", allow_module_level=True)


@functools.cache
def library(name: str) -> Any:
    """A module of the library's core, bound to the simulator."""
    with active():
        source = str(Path(CHECKOUT) / "src")
        if source not in sys.path:
            sys.path.insert(0, source)
        return importlib.import_module(f"nkilib_src.nkilib.core.{name}")


# -- prefill: attention_cte ------------------------------------------------------------------------------------

HALF = [(0, 200)] * 200 + [(200, 512)] * 312
PREFILL: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal_mask": False},
    "scale": {"scale": 0.125},
    "ragged": {"q_len": 333, "d": 96},
    "float32": {"dtype": torch.float32},
    "d128": {"d": 128, "q_len": 1024},
    "cross": {"q_len": 128, "kv_len": 384, "causal_mask": False},
    "tp_q": {"tp_q": False},
    "tp_k": {"tp_k": True},
    "tp_out": {"tp_out": True},
    "gqa": {"b": 8, "b_kv": 2},
    "sink": {"sink": True},
    "window128": {"q_len": 512, "sliding_window": 128},
    "window200": {"q_len": 640, "sliding_window": 200},
    "softmax": {"cache_softmax": True},
    "lnc2": {"b": 2, "lnc": 2},
    "lnc2 split": {"q_len": 1024, "lnc": 2},
    "cp": {"kv_len": 1024, "offset": 256, "global_cp_deg": 4},
    "cp strided": {"kv_len": 1024, "offset": 1, "global_cp_deg": 4, "cp_strided_q_slicing": True},
    "cp window": {"kv_len": 1024, "offset": 512, "global_cp_deg": 4, "sliding_window": 128},
    "prefix": {"prior": 512, "used": 300},
    "prefix window": {"prior": 512, "used": 300, "sliding_window": 128},
    "bounds": {"q_len": 512, "bounds": HALF},
    "two sections": {"q_len": 128, "kv_len": 11264, "causal_mask": False},
}


def prefill(
    target: str,
    memory: str,
    b: int = 1,
    b_kv: int | None = None,
    q_len: int = 256,
    kv_len: int | None = None,
    d: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    lnc: int = 1,
    prior: int = 0,
    used: int = 0,
    sink: bool = False,
    offset: int | None = None,
    bounds: list[tuple[int, int]] | None = None,
    **flags: Any,
) -> float:
    """The largest error of `attention_cte` against its reference."""
    g = torch.Generator().manual_seed(q_len + d)
    b_kv, kv_len = b_kv or b, kv_len or q_len

    def random(*shape: int, swap: bool = False) -> torch.Tensor:
        x = torch.randn(*shape, generator=g)
        return (x.transpose(1, 2) if swap else x).to(dtype).contiguous()

    swap_k = flags.get("tp_k", False)
    inputs: dict[str, Any] = {
        "q": random(b, q_len, d, swap=not flags.get("tp_q", True)),
        "k": random(b_kv, d, kv_len, swap=swap_k),
        "v": random(b_kv, kv_len, d),
        "sliding_window": 0,
        **flags,
    }
    inputs["q"] = inputs["q"] * (2 if "scale" in flags else 2 / d**0.5)
    if prior:
        inputs |= {"k_prior": random(b_kv, d, prior, swap=swap_k), "v_prior": random(b_kv, prior, d)}
        inputs["prior_used_len"] = torch.tensor([used], dtype=torch.int32)
    if sink:
        inputs["sink"] = random(b, 1)
    if offset is not None:
        inputs["cp_offset"] = torch.tensor([[offset]], dtype=torch.int32)
    if bounds is not None:
        low, high = torch.tensor(bounds, dtype=torch.float32).unbind(1)
        inputs |= {"bound_min": low[:, None].contiguous(), "bound_max": high[:, None].contiguous()}
    got = run(
        library("attention.attention_cte").attention_cte,
        lnc=lnc,
        target=target,
        memory=memory,
        # The library gives its cores unequal parts of a causal sequence.
        same_instructions=False,
        **inputs,
    ).outputs
    expected = library("attention.attention_cte_torch").attention_cte_torch_ref(**inputs)
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    return max(float((x.float() - y.float()).abs().max()) for x, y in pairs)


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("target,memory", [("gen3", "logical"), ("gen4", "physical")])
@pytest.mark.parametrize("case", PREFILL)
def test_attention_cte(case: str, target: str, memory: str) -> None:
    assert prefill(target, memory, **PREFILL[case]) < 0.02


# -- token generation: attention_tkg ---------------------------------------------------------------------------


def tables() -> list[tuple[str, str]]:
    """(config, options) of the library's own table of quick tests, as source; no longer than LONGEST."""
    path = Path(CHECKOUT) / "test/integration/nkilib/core/attention/test_attention_tkg.py"
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "attention_tkg_fast_configs":
            assert isinstance(node.value, ast.List)
            for row in node.value.elts:
                assert isinstance(row, ast.List) and isinstance(row.elts[0], ast.Call)
                sizes = [ast.literal_eval(a) for a in row.elts[0].args]
                if sizes[3] <= LONGEST and sizes[0] * sizes[1] * sizes[2] <= 256:
                    found.append((ast.unparse(row.elts[0]), ast.unparse(row.elts[1]) if row.elts[1:] else ""))
    return found


MORE = [
    (f"AttnTKGConfig({sizes}, tp_k_prior={tp_k}, {flags})", options)
    for sizes, tp_k, flags, options in (
        ("2, 4, 1, 256, 256, 64, 0", True, "qk_in_sb=True", ""),
        ("2, 4, 1, 256, 512, 64, 0", False, "qk_in_sb=True, use_pos_id=True", ""),
        ("2, 2, 4, 512, 512, 128, 0", True, "qk_in_sb=True, use_pos_id=True, strided_mm1=False", "test_sink=True"),
        ("1, 8, 1, 1024, 1024, 128, 0", True, "qk_in_sb=True, use_pos_id=True", "sliding_window=128"),
        ("1, 8, 2, 512, 512, 64, 0", False, "qk_in_sb=True, use_pos_id=True, out_in_sb=True", "sliding_window=256"),
        ("2, 2, 2, 512, 512, 128, 32", True, "qk_in_sb=True, strided_mm1=False", ""),
        ("2, 2, 2, 512, 512, 64, 32", True, "qk_in_sb=True, strided_mm1=False, use_pos_id=True", "test_sink=True"),
        ("2, 2, 2, 512, 512, 128, 16", True, "qk_in_sb=True, strided_mm1=False, use_pos_id=True", "sliding_window=128"),
        ("2, 2, 2, 512, 512, 128, 16", True, "qk_in_sb=True, strided_mm1=False", "fp8_kv=True"),
        ("2, 2, 2, 512, 512, 128, 0", True, "qk_in_sb=True", "fp8_kv=True"),
        ("2, 2, 3, 512, 512, 128, 0", True, "use_pos_id=True, fuse_rope=True", ""),
        ("2, 2, 3, 512, 512, 128, 0", True, "use_pos_id=True, fuse_rope=True, k_out_in_sb=True, qk_in_sb=True", ""),
        ("2, 2, 3, 512, 512, 128, 0", True, "use_pos_id=True, fuse_rope=True", "dtype='float32'"),
    )
]


def decode(config: str, options: str, lnc: int, memory: str) -> float:
    """The largest error of `attention_tkg` against its reference, relative to the largest output."""
    tkg, utils = library("attention.attention_tkg"), library("attention.attention_tkg_utils")
    cfg = eval(config, {"AttnTKGConfig": utils.AttnTKGConfig})
    extra = eval(f"dict({options.removeprefix('AttnTKGTestParams').strip('()')})", {"nl": language})
    inputs = decode_inputs(cfg, extra, lnc)
    out_shape = (
        (cfg.d_head, cfg.bs * cfg.q_head * cfg.s_active)
        if cfg.out_in_sb
        else (cfg.bs, cfg.q_head, cfg.d_head, cfg.s_active)
    )
    k_shape = (cfg.d_head, cfg.bs * cfg.s_active) if cfg.k_out_in_sb else (cfg.bs, 1, cfg.d_head, cfg.s_active)
    kind = extra.get("dtype", "bfloat16")
    got = run(
        decode_kernel,
        tkg,
        cfg,
        kind,
        out_shape,
        k_shape,
        lnc=lnc,
        target="gen3",
        memory=memory,
        # It computes on halves of tiles that it has not written, and sends such rows, but never uses the results.
        uninitialized="nan",
        same_instructions=False,
        **inputs,
    ).outputs
    reference = library("attention.attention_tkg_torch").attention_tkg_torch_ref
    expected = reference[lnc](
        **{k: plain(v) for k, v in inputs.items()},
        out=torch.zeros(out_shape),
        k_out=torch.zeros(k_shape) if cfg.fuse_rope else None,
        cfg=cfg,
        sbm=None,
        DBG_TENSORS=None,
    )
    pairs = [(x, y) for x, y in zip(got, expected, strict=False) if y is not None]
    return max(float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in pairs)


def plain(x: torch.Tensor | None) -> torch.Tensor | None:
    """As the references take it: float32, and indices that torch can index with."""
    return x if x is None else x.float() if x.is_floating_point() else x.long() if x.dtype == torch.uint32 else x


def decode_inputs(cfg: Any, extra: dict[str, Any], lnc: int) -> dict[str, Any]:
    rng = np.random.default_rng(cfg.curr_sprior + cfg.s_active)
    kind = torch.float8_e4m3fn if extra.get("fp8_kv") else getattr(torch, extra.get("dtype", "bfloat16"))

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(kind)

    bs, heads, active, d, prior = cfg.bs, cfg.q_head, cfg.s_active, cfg.d_head, cfg.curr_sprior
    blocks = bs * prior // cfg.block_len if cfg.block_len else 0
    flat = (bs, 1, cfg.full_sprior, d)
    k_shape = (blocks, cfg.block_len, d) if blocks else flat if cfg.tp_k_prior else (bs, 1, d, cfg.full_sprior)
    position = (np.arange(bs) * 3 + prior // 4 * 3) % (prior - active)
    if cfg.use_pos_id:
        ones = torch.ones(active, active).tril()[None, None].expand(bs, heads, -1, -1)
        mask = ones.permute(3, 0, 1, 2)
    else:
        mask = library("attention.gen_mask_tkg_torch").build_full_attention_mask(
            cache_lens=torch.from_numpy(position).float(),
            batch=bs,
            num_heads=heads,
            s_active=active,
            s_ctx=prior,
            lnc=lnc,
            block_len=cfg.block_len,
            include_active_mask=True,
            transposed=True,
            enable_fa_s_prior_tiling=cfg.enable_fa_s_prior_tiling,
        )
    window = extra.get("sliding_window", 0)
    rows = position[:, None] + np.arange(active)
    first = rows - window + 1
    first = np.maximum(first, 0) if cfg.block_len else first % prior
    fused = cfg.fuse_rope or cfg.use_pos_id
    positions = rows if window else np.broadcast_to(position[:, None], rows.shape)
    table = None
    if blocks:
        table = rng.permutation(blocks).reshape(bs, -1).astype(np.uint32)
        for b in range(bs):
            table[b, -(-(position[b] + active) // cfg.block_len) :] = 0
    return {
        "q": random(d, bs * heads * active) if cfg.qk_in_sb else random(bs, heads, active, d),
        "k_active": random(d, bs * active) if cfg.qk_in_sb else random(bs, 1, active, d),
        "v_active": random(bs, 1, active, d),
        "k_prior": random(*k_shape),
        "v_prior": random(*(k_shape if blocks else flat)),
        "mask": (mask != 0).to(torch.uint8).contiguous(),
        "inv_freqs": torch.from_numpy(rng.random((d // 2, 1), np.float32)) if cfg.fuse_rope else None,
        "rope_pos_ids": torch.from_numpy(positions.astype(np.float32)) if fused else None,
        "start_pos_ids": torch.from_numpy(first.astype(np.float32)) if fused and window else None,
        "sink": torch.from_numpy(rng.standard_normal((heads, 1), np.float32)) if extra.get("test_sink") else None,
        "active_blocks_table": None if table is None else torch.from_numpy(table),
    }


def decode_kernel(
    tkg: Any,
    cfg: Any,
    kind: str,
    out_shape: Any,
    k_shape: Any,
    q: Any,
    k_active: Any,
    v_active: Any,
    k_prior: Any,
    v_prior: Any,
    mask: Any,
    inv_freqs: Any,
    rope_pos_ids: Any,
    start_pos_ids: Any,
    sink: Any,
    active_blocks_table: Any,
) -> Any:
    """Calls `attention_tkg` with its memory manager, and brings what it leaves in SBUF to HBM."""
    with active():
        import nki.isa as nisa
        import nki.language as nl

    allocator, logging = library("utils.allocator"), library("utils.logging")
    # The upper part of SBUF is left to the compiler, as the library's own tests do.
    manager = allocator.SbufManager(0, nl.tile_size.total_available_sbuf_size - 16384, logging.Logger("SBM"))
    manager.open_scope()

    def output(shape: Any, on_chip: bool) -> Any:
        return (manager.alloc_stack if on_chip else nl.ndarray)(
            shape, dtype=kind, buffer=nl.sbuf if on_chip else nl.shared_hbm
        )

    def loaded(x: Any) -> Any:
        if not cfg.qk_in_sb:
            return x
        tile = manager.alloc_stack(x.shape, dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(tile, x)
        return tile

    def stored(x: Any, on_chip: bool) -> Any:
        if not on_chip:
            return x
        result = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=result, src=x)
        return result

    out = output(out_shape, cfg.out_in_sb)
    k_out = output(k_shape, cfg.k_out_in_sb) if cfg.fuse_rope else None
    out, k_out = tkg.attention_tkg(
        loaded(q),
        loaded(k_active),
        v_active,
        k_prior,
        v_prior,
        mask,
        out,
        cfg,
        manager,
        inv_freqs,
        rope_pos_ids,
        start_pos_ids,
        sink,
        active_blocks_table,
        k_out,
        DBG_TENSORS=None,
    )
    results = (stored(out, cfg.out_in_sb), stored(k_out, cfg.k_out_in_sb) if cfg.fuse_rope else None)
    manager.close_scope()
    return results if cfg.fuse_rope else results[:1]


@pytest.mark.parametrize("memory", ["logical", "physical"])
@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("config,options", [*MORE, *tables()])
def test_attention_tkg(config: str, options: str, lnc: int, memory: str) -> None:
    assert decode(config, options, lnc, memory) < 0.03
