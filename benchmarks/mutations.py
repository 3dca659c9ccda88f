"""Break the simulator and the kernels, one place at a time, and see whether the tests notice.

python -m benchmarks.mutations [word ...]      only the mutations whose name contains one of the words

A mutation replaces a piece of source by a wrong one and runs the tests of that source. It is noticed if they fail, and
survives if they pass. A mutation that may survive says why. The command fails if another one survives, or if one that
may survive is noticed. The sources are changed in a copy of the repository, never in place.
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
TESTS = (
    "tests/simulator/test_run.py",
    "tests/simulator/test_instructions.py",
    "tests/simulator/test_rules.py",
)


@dataclass(frozen=True)
class Mutation:
    """`old` in `path` becomes `new`; `tests` must fail. `survives` says why they need not."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS
    survives: str = ""


def machine(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"{SIMULATOR}/machine/{file}", old, new)


def isa(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"{SIMULATOR}/nki/isa/{file}", old, new)


def language(name: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, f"{SIMULATOR}/nki/language/{file}", old, new)


MUTATIONS: tuple[Mutation, ...] = (
    # conversions and operators
    machine(
        "bfloat16 truncates",
        "dtypes.py",
        "lambda x: x.astype(ml_dtypes.bfloat16)",
        "lambda x: (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(ml_dtypes.bfloat16)",
    ),
    machine(
        "bfloat16 loads a bit too much",
        "dtypes.py",
        "<< np.uint32(16)).view",
        "<< np.uint32(16) | np.uint32(1)).view",
    ),
    machine(
        "tfloat32 truncates",
        "dtypes.py",
        "np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))",
        "np.uint32(0)",
    ),
    machine("integers truncate", "dtypes.py", "np.rint(x.astype(np.float64))", "np.trunc(x.astype(np.float64))"),
    machine("integers wrap", "dtypes.py", "limits.min, limits.max)", "-(2**62), 2**62)"),
    machine("subtract adds", "operators.py", 'Operator("subtract", np.subtract', 'Operator("subtract", np.add'),
    machine("maximum is minimum", "operators.py", 'Operator("maximum", np.maximum', 'Operator("maximum", np.minimum'),
    machine("greater_equal is greater", "operators.py", "_float(np.greater_equal)", "_float(np.greater)"),
    machine("less_equal is less", "operators.py", "_float(np.less_equal)", "_float(np.less)"),
    machine("exp is expm1", "operators.py", "activation=np.exp)", "activation=np.expm1)"),
    # tensor engine
    isa("matmul transposes the other operand", "matmul.py", "np.matmul(a.T, b)", "np.matmul(b.T, a).T * 1.0001"),
    isa("matmul always overwrites", "matmul.py", "value = kind.load(old) + value", "value = value"),
    isa(
        "matmul always accumulates",
        "matmul.py",
        "if accumulate or (accumulate is None and begun.all()):",
        "if begun.all():",
    ),
    isa(
        "matmul accumulates by tile",
        "matmul.py",
        "np.where(begun, kind.load(old) + value, value)",
        "kind.load(old) + value",
    ),
    isa("matmul forgets that it wrote", "matmul.py", "    begun[...] = True\n", ""),
    isa("a write does not end an accumulation", "rules.py", "        t.begun()[...] = False\n", "        pass\n"),
    isa(
        "double_row drops a row",
        "matmul.py",
        "x.reshape(2 * len(x), -1) for x in (a, b)",
        "x.reshape(2 * len(x), -1) * (np.arange(2 * len(x)) % 2)[:, None] for x in (a, b)",
    ),
    isa("nc_transpose does not", "matmul.py", ".reshape(p, f).T.reshape(dst.shape)", ".reshape(dst.shape)"),
    # scalar engine
    isa("activation forgets scale", "activations.py", "        x = x * factor\n", "        pass\n"),
    isa("activation forgets bias", "activations.py", "x = x + i.scalar", "x = x + 0 * i.scalar"),
    isa("registers start over", "activations.py", "total = op.binary(held, total)", "pass"),
    isa("registers forget reduce_init", "activations.py", "total = op.binary(init, total)", "pass"),
    isa(
        "registers are not kept",
        "activations.py",
        "        held[:] = total\n        registers.op = op.name\n",
        "        held = total\n        registers.op = op.name\n",
    ),
    isa("reduce_res is not negated", "activations.py", "-registers if negate else registers", "registers"),
    isa(
        "operands are not swapped",
        "activations.py",
        "op.binary(y, x) if reverse else op.binary(x, y)",
        "op.binary(x, y)",
    ),
    # vector engine
    isa(
        "tensor_copy casts through float32",
        "elementwise.py",
        'if i.operands["dst"].dtype == i.operands["src"].dtype and not scalar:',
        "if False:",
    ),
    isa("tensor_copy on the scalar engine keeps bits", "elementwise.py", "].dtype and not scalar:", "].dtype:"),
    isa(
        "memset fills with zero",
        "elementwise.py",
        'i.write_raw("dst", kind.store(np.array(value, np.float32)))',
        'i.write_raw("dst", kind.store(np.array(0, np.float32)))',
    ),
    isa(
        "predicate is not reversed",
        "elementwise.py",
        "!= bool(reverse_pred)\n    if isinstance(src",
        "!= False\n    if isinstance(src",
    ),
    isa("predicated copy copies all", "elementwise.py", "value, where=chosen)", "value)"),
    isa(
        "predicated copy marks all as written",
        "elementwise.py",
        "mark_written(dst, chosen)",
        "mark_written(dst)",
    ),
    isa(
        "integers go through float32",
        "elementwise.py",
        "if not engine.value and arithmetic and (on_gpsimd or words):",
        "if not engine.value and on_gpsimd:",
    ),
    isa(
        "tensor_scalar drops the second operator",
        "elementwise.py",
        'y = apply_alu(i, "1", op1, y, operand1, reverse1)',
        "pass",
    ),
    isa(
        "scalar_tensor_tensor ignores reverse1",
        "elementwise.py",
        'i.read("operand1"), reverse1)',
        'i.read("operand1"))',
    ),
    isa(
        "reciprocal is off by an ulp",
        "elementwise.py",
        'np.float32(1) / i.read("data")',
        'np.float32(1) / i.read("data") * np.float32(1.00001)',
    ),
    isa("shuffle ignores quadrants", "elementwise.py", "p // 32 * 32 + mask[p % 32]", "mask[p % 32]"),
    isa(
        "shuffle copies 255 too",
        "elementwise.py",
        "for p in range(dst.shape[0]) if mask[p % 32] != 255]",
        "for p in range(dst.shape[0])]",
    ),
    isa(
        "scan forgets its start",
        "elementwise.py",
        'i.scalar("initial", initial, "data0", any_float=True), (len',
        "np.float32(0), (len",
    ),
    isa("bit operators swap", "elementwise.py", "op.bits(y, x) if reverse else op.bits(x, y)", "op.bits(y, x)"),
    # reductions
    isa("tensor_reduce is not negated", "reductions.py", "-y if negate else y", "y"),
    isa("tensor_reduce takes all axes", "reductions.py", "kept = math.prod(data.shape[1 : axes[0]])", "kept = 1"),
    isa(
        "range_select includes its end",
        "reductions.py",
        "comp_op1.binary(index, upper)",
        "comp_op1.binary(index - 1, upper)",
    ),
    isa(
        "range_select starts at zero",
        "reductions.py",
        "np.arange(range_start, range_start + x.shape[1]",
        "np.arange(0, x.shape[1]",
    ),
    isa("range_select takes either bound", "reductions.py", "!= 0) & (comp_op1", "!= 0) | (comp_op1"),
    isa(
        "select_reduce ignores reverse_pred",
        "reductions.py",
        "!= 0) != bool(reverse_pred)\n    y",
        "!= 0)\n    y",
    ),
    isa(
        "exponential does not subtract",
        "reductions.py",
        'i.read("src") - i.scalar',
        'i.read("src") - 0 * i.scalar',
    ),
    # GpSimd
    isa("iota forgets the partition", "affine.py", "[:, None] * channel_multiplier", "[:, None] * 0"),
    isa("iota forgets the offset", "affine.py", "np.array([[offset]], np.int64)", "np.array([[0]], np.int64)"),
    isa(
        "affine_select compares the other way",
        "affine.py",
        "cmp_op.binary(_affine(i, pattern, offset, channel_multiplier), 0)",
        "cmp_op.binary(0, _affine(i, pattern, offset, channel_multiplier))",
    ),
    # DMA
    isa(
        "gather takes rows in order",
        "dma.py",
        "_elements(src, rows)[_indices(src)[ok]], src.dtype",
        "_elements(src, rows)[np.flatnonzero(ok)], src.dtype",
    ),
    isa(
        "scatter writes rows in order",
        "dma.py",
        "    target = _indices(dst)[ok]\n",
        "    target = np.flatnonzero(ok)\n",
    ),
    isa("skipped rows shift", "dma.py", "dst.array()[ok] = values", "dst.array()[: ok.sum()] = values"),
    isa("indices are read by row", "dma.py", ".reshape(by.index.shape[0], -1).T.reshape(-1)", ".reshape(-1)"),
    isa("dma_transpose swaps the middle", "dma.py", "4: (3, 1, 2, 0)}", "4: (3, 2, 1, 0)}"),
    isa(
        "dma_compute drops a source",
        "dma.py",
        "    for t in srcs:\n        i.operands",
        "    for t in srcs[1:]:\n        i.operands",
    ),
    isa("scalar offset is ignored", "rules.py", "t.offset + index_value(by.index, what) * by.stride", "t.offset"),
    # views
    machine("ap ignores its offset", "tensor.py", "shape, strides, offset or 0, by)", "shape, strides, 0, by)"),
    machine(
        "slices ignore their step",
        "tensor.py",
        "strides.append(self.strides[d] * step)",
        "strides.append(self.strides[d])",
    ),
    isa(
        "partly written counts as written",
        "rules.py",
        "    t.shadow(marks)[...] = True\n",
        "    s.complete = True\n",
    ),
    machine(
        "marks of bytes are those of elements",
        "tensor.py",
        "        if self.storage.bytewise:\n",
        "        if False:\n",
    ),
    # two cores
    isa("sendrecv keeps its own", "control.py", 'i.write_raw("dst", received)', 'i.write_raw("dst", values)'),
    isa("barrier lets pass", "control.py", 'i.core.link.meet(i.core.id, ("core_barrier", None), None)', "pass"),
    machine("shared tensors are not", "pair.py", "            storage = other\n", "            pass\n"),
    language(
        "while_loop runs once",
        "control.py",
        'while register_value(condition, "nl.while_loop"):\n        following',
        'if register_value(condition, "nl.while_loop"):\n        following',
    ),
    language("fori_loop ignores its step", "control.py", "upper), step):\n", "upper), 1):\n"),
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
