"""The lint over kernel source: every kernel passes under both profiles, and each rule fires on what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

import neuron_attn_rewrite.kernels.nki as package
from neuron_attn_rewrite.simulator import lint
from neuron_attn_rewrite.simulator.lint import BOTH, RULES, check

FILES = [p for p in sorted(Path(package.__path__[0]).glob("*.py")) if lint.is_kernel_file(p.read_text())]

# Each is a module, or the body of a kernel.
BROKEN: dict[str, list[str]] = {
    "old-package": ["import neuronxcc.nki as nki", "from neuronxcc.nki import language as nl"],
    "old-name": ["i = nl.arange(128)", "for i in nl.dynamic_range(4):\n        pass", "nl.load_transpose2d(x)"],
    "mask-argument": ["nisa.tensor_copy(dst=y, src=x, mask=m)"],
    "result": ["y = nisa.tensor_copy(dst=y, src=x)", "f(nisa.activation(dst=y, op=nl.exp, data=x))"],
    "keywords": ["nisa.tensor_copy(y, x)", "nisa.dma_copy(y, src=x)"],
    "operator": [
        "nisa.activation(dst=y, op='exp', data=x)",
        "nisa.tensor_reduce(dst=y, op=np.max, data=x, axis=1)",
        "y = nl.ndarray((1, 1), dtype=nl.float32, buffer='sbuf')",
    ],
    "buffer": ["y = nl.ndarray((1, 1), dtype=nl.float32)"],
    "language-math": ["y = nl.load(x)", "y = nl.exp(x)", "nl.store(x, y)"],
    "accumulate": ["nisa.nc_matmul(dst=y, stationary=x, moving=x)"],
    "jit-options": ["@nki.jit(mode='trace')\ndef kernel(x):\n    pass"],
    "jit-call": ["@nki.jit\ndef a(x):\n    pass\n@nki.jit\ndef b(x):\n    a(x)"],
    "defaults": ["def f(x, y=[]):\n    pass", "def f(x, y={}):\n    pass"],
    "keyword-only": ["def f(*, x):\n    pass", "def f(*x):\n    pass", "def f(**x):\n    pass"],
    "nested": ["def g():\n        pass", "class G:\n        pass"],
    "while": ["while x:\n        pass"],
    "impure": ["x = os.environ['A']", "x = time.time()", "x = np.zeros(3)"],
    "global-state": ["cache = {}", "tiles: list = []"],
    "name-twice": ["nisa.tensor_copy(dst=y, src=x, name='a')\n    nisa.tensor_copy(dst=y, src=x, name='a')"],
    "sliced-ap": ["f(x[0:3].ap([[1, 3]]))"],
    "negative-index": ["y = x[-1]", "y = x[0, :-1]"],
    "expression": [
        "f(lambda: 0)",
        "y = [i for i in x]",
        "y = {1}",
        "y = (z := 1)",
        "f(*x)",
        "f(**x)",
        "y = {1: 2}",
        "y = f'{x:.2f}'",
        "y = x @ x",
    ],
    "statement": [
        "raise ValueError",
        "del x",
        "try:\n        pass\n    finally:\n        pass",
        "import math",
        "global x",
        "with open(x) as f:\n        pass",
        "match x:\n        case 1:\n            pass",
    ],
    "builtin": ["for i in enumerate(x):\n        pass", "y = sum(x)", "x.sort()"],
    "comparison": ["y = 0 < x < 3"],
    "identity": ["y = x is y"],
    "loop-target": ["for a, b in x:\n        pass", "for a in x:\n        pass\n    else:\n        pass"],
}
FINE = """
import nki
import nki.isa as nisa
import nki.language as nl

SIZES = (1, 2)


@nki.jit
def kernel(x, y=None, sizes=(1,)):
    out = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.shared_hbm)
    for i in range(len(sizes)):
        tile = nl.ndarray((128, 4), dtype=nl.float32, buffer=nl.sbuf, name=f"tile{i}")
        if y is not None and 0 < i and i < 3:
            nisa.memset(dst=tile, value=0.0)
        a, b = tile.shape
        nisa.nc_matmul(dst=tile[:, 0:1], stationary=x, moving=x, accumulate=i > 0)
    with nl.no_reorder():
        nisa.dma_copy(dst=out, src=tile.ap([[4, 128], [1, 4]]))
    return out
"""


def as_module(snippet: str) -> str:
    starts = ("import neuronxcc", "from", "@nki.jit", "cache", "tiles:", "def f(")
    is_module = snippet.startswith(starts)
    return snippet if is_module else f"def kernel(x, y, z, m):\n    {snippet}\n"


def test_each_rule_has_an_example() -> None:
    assert BROKEN.keys() == RULES.keys()


@pytest.mark.parametrize(("code", "snippet"), [(code, s) for code, all_ in BROKEN.items() for s in all_])
def test_rule_fires(code: str, snippet: str) -> None:
    for profile in BOTH:
        codes = {f.code for f in check(as_module(snippet), profile)}
        assert (code in codes) == (profile in RULES[code].profiles), codes


@pytest.mark.parametrize("profile", BOTH)
def test_fine_source_passes(profile: str) -> None:
    assert check(FINE, profile) == []


@pytest.mark.parametrize("profile", BOTH)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_kernel_passes(path: Path, profile: str) -> None:
    assert [str(f) for f in check(path.read_text(), profile)] == []


def test_kernel_files_are_found() -> None:
    assert {"core.py", "flash.py"} <= {p.name for p in FILES}
