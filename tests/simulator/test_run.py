"""The simulator runs kernels: values, traces, two cores, and how it is switched on."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from neuron_attn_rewrite.simulator import active, run


@pytest.fixture(autouse=True)
def _switched_on(request: pytest.FixtureRequest) -> Any:
    with active(target="gen3"):
        import nki.isa as nisa
        import nki.language as nl

        request.module.nisa, request.module.nl = nisa, nl
        yield


nisa: Any = None
nl: Any = None


def attention(q: Any, k: Any, v: Any) -> Any:
    """One query tile: q [d, 128], k [d, S], v [S, d] -> [128, d]."""
    d, s = k.shape
    out = nl.ndarray((128, d), q.dtype, buffer=nl.shared_hbm)
    qs, ks = nl.ndarray((d, 128), q.dtype), nl.ndarray((d, s), q.dtype)
    nisa.dma_copy(dst=qs, src=q)
    nisa.dma_copy(dst=ks, src=k)
    scores = nl.ndarray((128, s), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(scores, qs, ks, accumulate=False)
    low, total = nl.ndarray((128, 1), nl.float32), nl.ndarray((128, 1), nl.float32)
    nisa.tensor_reduce(low, nl.maximum, scores, axis=1, negate=True)
    p = nl.ndarray((128, s), nl.bfloat16)
    nisa.activation(
        p, nl.exp, scores, bias=low, reduce_op=nl.add, reduce_res=total, reduce_cmd=nisa.reduce_cmd.reset_reduce
    )
    result = nl.ndarray((128, d), nl.float32, buffer=nl.psum)
    for j in range(s // 128):
        vs, across = nl.ndarray((128, d), v.dtype), nl.ndarray((128, 128), nl.bfloat16, buffer=nl.psum)
        nisa.dma_copy(dst=vs, src=v[j * 128 : (j + 1) * 128, :])
        nisa.nc_transpose(across, p[:, j * 128 : (j + 1) * 128])
        weights = nl.ndarray((128, 128), nl.bfloat16)
        nisa.tensor_copy(weights, across)
        nisa.nc_matmul(result, weights, vs, accumulate=j > 0)
    nisa.reciprocal(total, total)
    rows = nl.ndarray((128, d), q.dtype)
    nisa.tensor_scalar(rows, result, nl.multiply, total)
    nisa.dma_copy(dst=out, src=rows)
    return out


@pytest.mark.parametrize("target", ["gen2", "gen3", "gen4"])
@pytest.mark.parametrize("memory", ["logical", "physical"])
def test_attention(target: str, memory: str) -> None:
    q, k, v = (torch.randn(n).bfloat16() for n in ((64, 128), (64, 512), (512, 64)))
    result = run(attention, q, k, v, target=target, memory=memory)
    expected = torch.softmax(q.double().T @ k.double(), -1) @ v.double()
    assert result.outputs.dtype == torch.bfloat16
    assert (result.outputs.double() - expected).abs().max() < 0.03
    assert result.trace.hbm_read == 2 * (64 * 128 + 2 * 64 * 512)
    assert result.trace.hbm_written == 2 * 64 * 128
    assert result.trace.counts()["nc_matmul"] == 5


def test_the_name_nki_is_free_afterwards() -> None:
    import nki

    assert "simulator" in nki.__version__
    with active():
        assert sys.modules["nki"] is nki


def test_two_cores_share_hbm() -> None:
    def double(x: Any) -> Any:
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        rows = x.shape[0] // nl.num_programs(0)
        mine = nl.ds(nl.program_id(0) * rows, rows)
        tile = nl.ndarray((rows, x.shape[1]), x.dtype)
        nisa.dma_copy(dst=tile, src=x[mine, :])
        nisa.tensor_scalar(tile, tile, nl.multiply, 2.0)
        nisa.dma_copy(dst=out[mine, :], src=tile)
        return out

    x = np.random.default_rng(0).standard_normal((128, 64), np.float32)
    for lnc in (1, 2):
        np.testing.assert_array_equal(run(double, x, lnc=lnc).outputs, 2 * x)
