"""The examples of NKI's documentation, unmodified, on the simulator.

They are somebody else's code and no part of this project: the tests run where NEURON_SDK names a checkout of
https://github.com/aws-neuron/aws-neuron-sdk, and count as not run elsewhere.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_attn_rewrite.simulator import active, run

SDK = os.environ.get("NEURON_SDK", "")
if not SDK:
    pytest.skip("NEURON_SDK names no checkout of aws-neuron/aws-neuron-sdk", allow_module_level=True)


def example(path: str, name: str) -> Any:
    """A kernel of an example, which is not left in `sys.modules`."""
    with active():
        return runpy.run_path(str(Path(SDK) / "nki" / "examples" / path))[name]


def scan(delta: Any, u: Any, a: Any, b: Any, c: Any) -> Any:
    """Mamba's recurrence, [batch, channels, seq_len]."""
    decay = np.exp(delta[:, :, None] * a[None, :, :, None])
    step = (delta * u)[:, :, None] * b[:, None]
    state, out = np.zeros(step.shape[:-1]), []
    for t in range(step.shape[-1]):
        state = decay[..., t] * state + step[..., t]
        out.append((state * c[:, None, :, t]).sum(2))
    return np.stack(out, -1)


def pool(x: Any, n: int) -> Any:
    return x.reshape(x.shape[0], x.shape[1] // n, n, x.shape[2] // n, n).mean((2, 4))


def normal(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


Case = tuple[str, str, tuple[Any, ...], Callable[..., Any]]
MATMUL, MAMBA = "matrix_multiplication/matrix_multiplication_nki_kernels.py", "fused_mamba/mamba_nki_kernels.py"
STATES = (normal(1, 128, 512) / 4, normal(1, 128, 512), -np.abs(normal(128, 4)), normal(1, 4, 512), normal(1, 4, 512))
CASES: list[Case] = [
    ("simulate/nki_simulate_example.py", "add_kernel", (normal(128, 512), normal(128, 512)), np.add),
    (
        "tensor_addition/tensor_addition_nki_kernels.py",
        "nki_tensor_add",
        (normal(256, 1024), normal(256, 1024)),
        np.add,
    ),
    (
        "transpose2d/transpose2d_nki_kernels.py",
        "tensor_transpose2D_kernel_",
        (normal(8, 12), (3, 4)),
        lambda x, s: x.reshape(8, *s).transpose(0, 2, 1).reshape(8, 12),
    ),
    ("average_pool2d/average_pool2d_nki_kernels.py", "tensor_avgpool_kernel", (normal(2, 6, 6), 2), pool),
    (MATMUL, "nki_matmul_basic_", (normal(128, 64), normal(128, 512)), lambda a, b: a.T @ b),
    *(
        (MATMUL, f"nki_matmul_{name}_", (normal(*a), normal(*b)), lambda a, b: a.T @ b)
        for name, a, b in (
            ("tiled", (256, 256), (256, 1024)),
            ("hoist_load", (256, 256), (256, 1024)),
            ("block_free_dimension", (256, 256), (256, 1024)),
            ("fully_optimized", (1024, 2048), (1024, 1024)),
        )
    ),
    *((MAMBA, f"mamba_v{n}", STATES, scan) for n in (1, 2, 3)),
]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("path,name,inputs,reference", CASES, ids=[c[1] for c in CASES])
def test_example(path: str, name: str, inputs: tuple[Any, ...], reference: Callable[..., Any]) -> None:
    got = run(
        example(path, name), *(x.copy() if isinstance(x, np.ndarray) else x for x in inputs), target="gen3"
    ).outputs
    expected = reference(*(x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in inputs))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=1e-3)
