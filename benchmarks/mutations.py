"""Break the simulator and the kernels, one place at a time, and see whether the tests notice.

python -m benchmarks.mutations [word ...]      only the mutations whose name contains one of the words

A mutation replaces a piece of source by a wrong one and runs the tests that are there for it. It is noticed if they
fail. What may survive is listed with the reason; anything else that survives, or a listed one that is noticed, ends
with an error. The sources are changed in a copy of the repository, never in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernel_mutations import BROKEN

ROOT = Path(__file__).parents[1]
SIMULATOR = "neuron_attn_rewrite/simulator"
TESTS = ("tests/test_simulator.py", "tests/test_simulator_ops.py", "tests/test_simulator_rules.py")


@dataclass(frozen=True)
class Mutation:
    """`old` in `path` becomes `new`; `tests` must fail. `survives` says why they need not."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS
    survives: str = ""


def sim(name: str, file: str, old: str, new: str, survives: str = "") -> Mutation:
    return Mutation(name, f"{SIMULATOR}/{file}", old, new, survives=survives)


MUTATIONS: tuple[Mutation, ...] = (
    # conversions and operators
    sim(
        "bfloat16 truncates",
        "dtypes.py",
        "lambda x: x.astype(ml_dtypes.bfloat16)",
        "lambda x: (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)",
    ),
    sim(
        "bfloat16 loads a bit too much", "dtypes.py", "<< np.uint32(16)).view", "<< np.uint32(16) | np.uint32(1)).view"
    ),
    sim(
        "tfloat32 truncates", "dtypes.py", "np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))", "np.uint32(0)"
    ),
    sim("integers truncate", "dtypes.py", "np.rint(x.astype(np.float64))", "np.trunc(x.astype(np.float64))"),
    sim("integers wrap", "dtypes.py", "limits.min, limits.max)", "-(2**62), 2**62)"),
    sim("subtract adds", "operators.py", 'Operator("subtract", np.subtract', 'Operator("subtract", np.add'),
    sim("maximum is minimum", "operators.py", 'Operator("maximum", np.maximum', 'Operator("maximum", np.minimum'),
    sim("greater_equal is greater", "operators.py", "_float(np.greater_equal)", "_float(np.greater)"),
    sim("less_equal is less", "operators.py", "_float(np.less_equal)", "_float(np.less)"),
    sim("exp is expm1", "operators.py", "activation=np.exp)", "activation=np.expm1)"),
    # tensor engine
    sim("matmul transposes the other operand", "isa/matmul.py", "np.matmul(a.T, b)", "np.matmul(b.T, a).T * 1.0001"),
    sim("matmul always overwrites", "isa/matmul.py", "value = kind.load(old) + value", "value = value"),
    sim(
        "matmul always accumulates",
        "isa/matmul.py",
        "if accumulate or (accumulate is None and begun.all()):",
        "if begun.all():",
    ),
    sim(
        "matmul accumulates by tile",
        "isa/matmul.py",
        "np.where(begun, kind.load(old) + value, value)",
        "kind.load(old) + value",
    ),
    sim("matmul forgets that it wrote", "isa/matmul.py", "    begun[...] = True\n", ""),
    sim("a write does not end an accumulation", "isa/rules.py", "        t.begun()[...] = False\n", "        pass\n"),
    sim(
        "double_row drops a row",
        "isa/matmul.py",
        "x.reshape(2 * len(x), -1) for x in (a, b)",
        "x.reshape(2 * len(x), -1) * (np.arange(2 * len(x)) % 2)[:, None] for x in (a, b)",
    ),
    sim("nc_transpose does not", "isa/matmul.py", ".reshape(p, f).T.reshape(dst.shape)", ".reshape(dst.shape)"),
    # scalar engine
    sim("activation forgets scale", "isa/activations.py", "        x = x * factor\n", "        pass\n"),
    sim("activation forgets bias", "isa/activations.py", "x = x + i.scalar", "x = x + 0 * i.scalar"),
    sim("registers start over", "isa/activations.py", "total = op.binary(held, total)", "pass"),
    sim("registers forget reduce_init", "isa/activations.py", "total = op.binary(init, total)", "pass"),
    sim(
        "registers are not kept",
        "isa/activations.py",
        "        held[:] = total\n        registers.op = op.name\n",
        "        held = total\n        registers.op = op.name\n",
    ),
    sim("reduce_res is not negated", "isa/activations.py", "-registers if negate else registers", "registers"),
    sim(
        "operands are not swapped",
        "isa/activations.py",
        "op.binary(y, x) if reverse else op.binary(x, y)",
        "op.binary(x, y)",
    ),
    # vector engine
    sim(
        "tensor_copy casts through float32",
        "isa/elementwise.py",
        'if i.operands["dst"].dtype == i.operands["src"].dtype and not scalar:',
        "if False:",
    ),
    sim("tensor_copy on the scalar engine keeps bits", "isa/elementwise.py", "].dtype and not scalar:", "].dtype:"),
    sim(
        "memset fills with zero",
        "isa/elementwise.py",
        'i.write_raw("dst", kind.store(np.array(value, np.float32)))',
        'i.write_raw("dst", kind.store(np.array(0, np.float32)))',
    ),
    sim(
        "predicate is not reversed",
        "isa/elementwise.py",
        "!= bool(reverse_pred)\n    if isinstance(src",
        "!= False\n    if isinstance(src",
    ),
    sim("predicated copy copies all", "isa/elementwise.py", "value, where=chosen)", "value)"),
    sim("predicated copy marks all as written", "isa/elementwise.py", "mark_written(dst, chosen)", "mark_written(dst)"),
    sim(
        "integers go through float32",
        "isa/elementwise.py",
        "if not engine.value and arithmetic and (on_gpsimd or words):",
        "if not engine.value and on_gpsimd:",
    ),
    sim(
        "tensor_scalar drops the second operator",
        "isa/elementwise.py",
        'y = apply_alu(i, "1", op1, y, operand1, reverse1)',
        "pass",
    ),
    sim(
        "scalar_tensor_tensor ignores reverse1",
        "isa/elementwise.py",
        'i.read("operand1"), reverse1)',
        'i.read("operand1"))',
    ),
    sim(
        "reciprocal is off by an ulp",
        "isa/elementwise.py",
        'np.float32(1) / i.read("data")',
        'np.float32(1) / i.read("data") * np.float32(1.00001)',
    ),
    sim("shuffle ignores quadrants", "isa/elementwise.py", "p // 32 * 32 + mask[p % 32]", "mask[p % 32]"),
    sim(
        "shuffle copies 255 too",
        "isa/elementwise.py",
        "for p in range(dst.shape[0]) if mask[p % 32] != 255]",
        "for p in range(dst.shape[0])]",
    ),
    sim(
        "scan forgets its start",
        "isa/elementwise.py",
        'i.scalar("initial", initial, "data0", any_float=True), (len',
        "np.float32(0), (len",
    ),
    sim("bit operators swap", "isa/elementwise.py", "op.bits(y, x) if reverse else op.bits(x, y)", "op.bits(y, x)"),
    # reductions
    sim("tensor_reduce is not negated", "isa/reductions.py", "-y if negate else y", "y"),
    sim("tensor_reduce takes all axes", "isa/reductions.py", "kept = math.prod(data.shape[1 : axes[0]])", "kept = 1"),
    sim(
        "range_select includes its end",
        "isa/reductions.py",
        "comp_op1.binary(index, upper)",
        "comp_op1.binary(index - 1, upper)",
    ),
    sim(
        "range_select starts at zero",
        "isa/reductions.py",
        "np.arange(range_start, range_start + x.shape[1]",
        "np.arange(0, x.shape[1]",
    ),
    sim("range_select takes either bound", "isa/reductions.py", "!= 0) & (comp_op1", "!= 0) | (comp_op1"),
    sim(
        "select_reduce ignores reverse_pred", "isa/reductions.py", "!= 0) != bool(reverse_pred)\n    y", "!= 0)\n    y"
    ),
    sim(
        "exponential does not subtract", "isa/reductions.py", 'i.read("src") - i.scalar', 'i.read("src") - 0 * i.scalar'
    ),
    # GpSimd
    sim("iota forgets the partition", "isa/affine.py", "[:, None] * channel_multiplier", "[:, None] * 0"),
    sim("iota forgets the offset", "isa/affine.py", "np.array([[offset]], np.int64)", "np.array([[0]], np.int64)"),
    sim(
        "affine_select compares the other way",
        "isa/affine.py",
        "cmp_op.binary(_affine(i, pattern, offset, channel_multiplier), 0)",
        "cmp_op.binary(0, _affine(i, pattern, offset, channel_multiplier))",
    ),
    # DMA
    sim(
        "gather takes rows in order",
        "isa/dma.py",
        "_elements(src, rows)[_indices(src)[ok]], src.dtype",
        "_elements(src, rows)[np.flatnonzero(ok)], src.dtype",
    ),
    sim(
        "scatter writes rows in order",
        "isa/dma.py",
        "    target = _indices(dst)[ok]\n",
        "    target = np.flatnonzero(ok)\n",
    ),
    sim("skipped rows shift", "isa/dma.py", "dst.array()[ok] = values", "dst.array()[: ok.sum()] = values"),
    sim("indices are read by row", "isa/dma.py", ".reshape(by.index.shape[0], -1).T.reshape(-1)", ".reshape(-1)"),
    sim("dma_transpose swaps the middle", "isa/dma.py", "4: (3, 1, 2, 0)}", "4: (3, 2, 1, 0)}"),
    sim(
        "dma_compute drops a source",
        "isa/dma.py",
        "    for t in srcs:\n        i.operands",
        "    for t in srcs[1:]:\n        i.operands",
    ),
    sim("scalar offset is ignored", "isa/rules.py", "t.offset + index_value(by.index, what) * by.stride", "t.offset"),
    # views
    sim("ap ignores its offset", "tensor.py", "shape, strides, offset or 0, by)", "shape, strides, 0, by)"),
    sim(
        "slices ignore their step",
        "tensor.py",
        "strides.append(self.strides[d] * step)",
        "strides.append(self.strides[d])",
    ),
    sim(
        "partly written counts as written",
        "isa/rules.py",
        "    t.shadow(marks)[...] = True\n",
        "    s.complete = True\n",
    ),
    sim(
        "marks of bytes are those of elements",
        "tensor.py",
        "        if self.storage.bytewise:\n",
        "        if False:\n",
    ),
    # two cores
    sim("sendrecv keeps its own", "isa/control.py", 'i.write_raw("dst", received)', 'i.write_raw("dst", values)'),
    sim("barrier lets pass", "isa/control.py", 'i.core.link.meet(i.core.id, ("core_barrier", None), None)', "pass"),
    sim("shared tensors are not", "launch.py", "            storage = other\n", "            pass\n"),
    sim(
        "while_loop runs once",
        "language.py",
        'while register_value(condition, "nl.while_loop"):\n        following',
        'if register_value(condition, "nl.while_loop"):\n        following',
    ),
    sim("fori_loop ignores its step", "language.py", "upper), step):\n", "upper), 1):\n"),
    *(Mutation(*broken) for broken in BROKEN),
)


def notices(mutation: Mutation, copy: Path) -> bool:
    """Whether the tests fail on the mutated copy."""
    path = copy / mutation.path
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.old!r} is {source.count(mutation.old)} times in {mutation.path}")
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *mutation.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        return done.returncode == 1
    finally:
        path.write_text(source)


def main() -> None:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
    wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for part in ("neuron_attn_rewrite", "tests", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / part)
        for mutation in chosen:
            noticed = notices(mutation, copy)
            expected = noticed != bool(mutation.survives)
            wrong += not expected
            verdict = "noticed" if noticed else "survives"
            print(f"{'ok ' if expected else 'BAD'} {verdict:9} {mutation.name}", flush=True)
    print(
        f"{len(chosen)} mutations, {sum(bool(m.survives) for m in chosen)} of them explained survivors, {wrong} wrong"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
