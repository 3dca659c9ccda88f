"""The tile rules of the kernels, each with a way to break it: rows of `benchmarks.mutations`."""

from __future__ import annotations

from typing import NamedTuple

KERNELS = "neuron_attn_rewrite/kernels"
FLASH = ("tests/kernels/nki/test_flash.py",)
CACHED = ("tests/ops/test_cached.py",)


class Broken(NamedTuple):
    """`old` in `path` becomes `new`; `tests` must fail, or `survives` says why they need not."""

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = FLASH
    survives: str = ""


def core(name: str, old: str, new: str, tests: tuple[str, ...] = FLASH, survives: str = "") -> Broken:
    return Broken(f"core: {name}", f"{KERNELS}/nki/core.py", old, new, tests, survives)


def loop(name: str, old: str, new: str, tests: tuple[str, ...] = FLASH, survives: str = "") -> Broken:
    return Broken(f"loop: {name}", f"{KERNELS}/nki/loop.py", old, new, tests, survives)


def paged(name: str, old: str, new: str, survives: str = "") -> Broken:
    return Broken(f"paged: {name}", f"{KERNELS}/nki/paged.py", old, new, CACHED, survives)


def tiling(name: str, old: str, new: str, survives: str = "") -> Broken:
    return Broken(f"tiling: {name}", f"{KERNELS}/nki/tiling.py", old, new, FLASH, survives)


def load(name: str, old: str, new: str) -> Broken:
    return Broken(f"load: {name}", f"{KERNELS}/nki/load.py", old, new)


def prepare(name: str, old: str, new: str, survives: str = "") -> Broken:
    return Broken(f"prepare: {name}", f"{KERNELS}/nki/prepare.py", old, new, FLASH, survives)


BROKEN: tuple[Broken, ...] = (
    # scores and masks
    core(
        "no accumulation over features",
        "moving=k_t[c][:, in_loaded], accumulate=c > 0)",
        "moving=k_t[c][:, in_loaded], accumulate=False)",
    ),
    core("key bias before the softcap", "if key_bias is not None and softcap is None:", "if key_bias is not None:"),
    core("key bias lost under a softcap", "data2=added, op=nl.add)", "data2=added, op=nl.maximum)"),
    core("bias added before the scale", "operand0=inner,", "operand0=1.0,"),
    core("whole pieces masked, ragged ones not", "                    i != 1,\n", "                    i == 1,\n"),
    core("nothing masked", "                    i != 1,\n", "                    False,\n"),
    core("everything masked", "                    i != 1,\n", "                    True,\n"),
    core("mask counts from the piece", "range_start=start,", "range_start=0,"),
    core("upper bound is seen", "comp_op1=nl.less,", "comp_op1=nl.less_equal,"),
    core("lower bound is hidden", "comp_op0=nl.greater_equal,", "comp_op0=nl.greater,"),
    core(
        "maximum of the last piece alone",
        "command = nisa.reduce_cmd.reset_reduce if first else nisa.reduce_cmd.reduce",
        "command = nisa.reduce_cmd.reset_reduce",
    ),
    # softmax
    core("maximum of this key range alone", "floor = state.neg_max", "floor = -factor * LOWEST"),
    core("no floor under the maximum", "LOWEST = -1.0e30", "LOWEST = -3.0e38"),
    core(
        "sum of the last piece alone",
        "reduce_cmd=nisa.reduce_cmd.reset_reduce if x == 0 else nisa.reduce_cmd.reduce,",
        "reduce_cmd=nisa.reduce_cmd.reset_reduce,",
    ),
    core("exponent without the factor", "            scale=factor,\n", "            scale=1.0,\n"),
    core(
        "state does not fade",
        "data=state.neg_max, bias=neg_max, scale=-1.0)",
        "data=state.neg_max, bias=0.0, scale=0.0)",
    ),
    core(
        "sum does not fade",
        "data=state.total, op0=nl.multiply, operand0=fade",
        "data=state.total, op0=nl.multiply, operand0=1.0",
    ),
    # weighted sum
    core(
        "values of the wrong block",
        "moving=values[0:keys, block + x // ROWS + i, :]",
        "moving=values[0:keys, block + i, :]",
    ),
    core("key ranges begin at block 0", "loaded.values, (first - loaded.base) // ROWS)", "loaded.values, 0)"),
    core("sum starts over each group of blocks", "accumulate=x + i > 0,", "accumulate=i > 0,"),
    core(
        "blocks of one group go to the PE twice",
        '("vector", 3, 5)',
        '("vector", 2, 5)',
        survives="the block is transposed twice, to the same place: slower, but not wrong",
    ),
    core("a block is not transposed", '("vector", 3, 5)', '("vector", 4, 5)'),
    # output
    core(
        "sink forgotten",
        "nisa.activation(dst=weight, op=nl.exp, data=weight)",
        "nisa.activation(dst=weight, op=nl.exp, data=weight, scale=0.0, bias=-80.0)",
    ),
    core(
        "sink not limited",
        "LARGEST_SINK = 40.0",
        "LARGEST_SINK = 3.0e38",
        survives="1 / inf is 0 in the simulator too: the limit keeps devices within the range of exp and log",
    ),
    core("mean in every row", "operand0=empty, op1=nl.add", "operand0=1.0, op1=nl.add"),
    Broken(
        "load: mean of too many",
        f"{KERNELS}/nki/load.py",
        "data=total, scale=1.0 / count)",
        "data=total, scale=1.0 / (count + 1))",
    ),
    core(
        "log-sum-exp of the sum alone",
        "data1=lse, data2=state.neg_max, op=nl.subtract)",
        "data1=lse, data2=lse, op=nl.maximum)",
    ),
    # loops
    loop(
        "one core's rows of a pair", "tiles[t][0][core], states[at], sinks[g]", "tiles[t][0][0], states[at], sinks[g]"
    ),
    loop("items in order", "_item(i * cores + core,", "_item(i * cores,"),
    loop(
        "group heads share the first one's query",
        "        head = item * query.group + g\n        start = head // query.q_heads",
        "        head = item * query.group\n        start = head // query.q_heads",
    ),
    loop("bounds of the tile before", "column = (row + ROWS - 1) // ROWS * 2", "column = row // ROWS * 2"),
    loop("batch elements share bounds", "src=source.bounds[min(batch, count - 1)]", "src=source.bounds[0]"),
    loop(
        "heads share a key bias",
        "h = min(item % query.kv_heads * query.group + g, heads - 1)\n            row",
        "h = 0\n            row",
    ),
    loop(
        "batch elements share a key bias",
        "b = min(item // query.kv_heads, batches - 1)\n            h",
        "b = 0\n            h",
    ),
    loop("bias of the first head for all", "(g == 0 or query.bias.shape[1] > 1)", "g == 0"),
    loop("bias of the first columns", "offset=offset + key_range.first", "offset=offset"),
    loop("sections overlap", "visits.append((s, a, min(a + sources[s].section, stop)))", "visits.append((s, a, stop))"),
    loop(
        "whole keys beyond the section",
        "max(min(key_range[2], b), full_start)",
        "max(key_range[2], full_start)",
        survives="a step cuts its columns at the end of its key range anyway",
    ),
    loop(
        "states are not parked",
        "if states[at + g] is None and not (final and part.stop == key_range.stop):",
        "if False:",
    ),
    loop("sinks of the first group", "item % query.kv_heads * query.group + g))", "g))"),
    loop(
        "the cache is not looked at",
        "for s in range(len(sources)):\n        start = sources",
        "for s in range(1):\n        start = sources",
        CACHED,
    ),
    paged("state of another tile", "_state(_gathered(states, at))", "_state(_gathered(states, q_index[g][:, 0:1]))"),
    paged(
        "skipped keys raise",
        "oob_mode=nisa.oob_mode.skip,\n            )\n            nisa.dma_copy(\n                dst=values",
        "oob_mode=nisa.oob_mode.error,\n            )\n            nisa.dma_copy(\n                dst=values",
    ),
    paged("bounds of the first tile", "bounds[:, 2 * t : 2 * t + 1]", "bounds[:, 0:1]"),
    paged(
        "new keys behind the tile",
        "last = min(row + ROWS, stop)",
        "last = stop",
        survives="the bounds hide what comes after a row: it costs time, the result is the same",
    ),
    paged(
        "sections hand nothing on",
        "if stop < row + ROWS:\n",
        "if False:\n",
    ),
    paged("both cores take the first heads", "        first = core\n", "        first = 0\n"),
    # on the host
    tiling("key ranges begin anywhere", "first = first // ALIGN * ALIGN", "first = first // 1"),
    tiling("whole from the first row on", "lo.amax((0, 2))", "lo.amin((0, 2))"),
    tiling("whole up to the last row", "hi.amin((0, 2))", "hi.amax((0, 2))"),
    tiling(
        "empty rows widen a tile",
        "torch.where(empty, 0, hi)",
        "torch.where(empty, hi, hi)",
        survives="a wider tile is masked: more keys cost time, the result is the same",
    ),
    tiling("a pair takes the first one's keys", "max(a[3], b[3]))", "a[3])"),
    tiling("a pair is whole where either is", "max(a[1], b[1]), min(a[2], b[2])", "min(a[1], b[1]), max(a[2], b[2])"),
    Broken(
        "reference: scale keeps its sign",
        f"{KERNELS}/reference.py",
        "return (-query, -scale) if scale < 0 else (query, scale)",
        "return query, scale",
    ),
    prepare("row bias is not divided", "scaled = (row / (terms.softcap or scale))", "scaled = row"),
    prepare(
        "low biases are hidden", "bias = torch.where(bias == -torch.inf, bias, bias.clamp_min(LOWEST_BIAS))", "pass"
    ),
    prepare("run-time bounds are planned as static", "exact = is_static(terms.bounds)", "exact = True"),
    prepare("rows may not be empty", "(empty or _hides_more(sources, terms))", "empty"),
)
