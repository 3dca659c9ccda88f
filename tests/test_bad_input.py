# ruff: noqa: E501
"""Bad calls of every public function and operator: each is a clear error of this package, or gives the right numbers.

Each function has a call that is right. Hypothesis replaces one or two of its arguments by something of another kind.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import neuron_attn_rewrite as nar
from neuron_attn_rewrite.kernels.schedule import Schedule, make_schedule
from tests.helpers import relative_error

OPS = torch.ops.neuron_attn
CALLS: Counter[str] = Counter()
"""How many calls were made, by function and by what they gave."""
CALLED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


NUMBERS: list[Any] = [
    -1, 0, 1, 2, 3, 7, 8, 9, 64, -64, 2**31 - 1, 2**31, -(2**31), 2**40, -(2**40), 2**63 - 1, 2**63, -(2**63), 2**70,
    0.5, -0.5, 1e-300, 1e-40, 1e38, 1e300, math.nan, math.inf, -math.inf, True, None, "1", "", b"1", [], [1], (1, 2), {}, 1j,
]  # fmt: skip
OTHERS: list[Any] = [None, 3, 0.5, "text", [1, 2], (), {}, object(), torch.float32, torch.tensor(0.5), nn.Linear(2, 2)]


def other_tensors(t: Tensor) -> list[Any]:
    """Tensors that are like `t` but for one thing."""
    casts = [
        t.to(d)
        for d in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8)
    ]
    shapes = [t[None], t.flatten(), t.new_zeros(()), t[:0]]
    for dim, size in enumerate(t.shape):
        shapes += [
            t.narrow(dim, 0, size - 1),
            torch.cat([t, t], dim),
            t.narrow(dim, 0, 1),
            t.movedim(dim, 0),
            t.narrow(dim, 0, 0),
        ]
    numbers = []
    if not t.is_floating_point() and t.dtype != torch.bool:
        numbers = [t + 1, t - 1, -t - 1, t + 2**20, torch.full_like(t, 2**31 - 1), torch.full_like(t, -(2**31))]
    return [
        *casts,
        *shapes,
        *numbers,
        t.to("meta"),
        t.to_sparse(),
        t.to(torch.complex64),
        torch.empty_like(t, device="meta"),
    ]


def others(value: Any) -> list[Any]:
    """What to try in the place of a value."""
    if isinstance(value, Tensor):
        return [*other_tensors(value), *OTHERS]
    if isinstance(value, (bool, int, float)) or value is None:
        return [*NUMBERS, torch.tensor(2), torch.tensor([1, 2]), torch.ones(1, device="meta")]
    if isinstance(value, str):
        return [
            "",
            "none",
            value.upper(),
            f" {value}",
            None,
            3,
            ["a"],
            "flash_fwd",
            "BSHD,BSHD,BSHD",
            "BSHD,BSHD,BSHD,XYZW",
        ]
    if isinstance(value, (tuple, list)) and value:
        kind, changed = type(value), []
        for i, part in enumerate(value):
            changed += [kind([*value[:i], new, *value[i + 1 :]]) for new in others(part)]
        return [*changed, kind(value[1:]), kind([*value, *value]), *OTHERS]
    return OTHERS


@dataclass(frozen=True)
class Door:
    """A public function with a call that is right."""

    call: Callable[..., Any]
    given: Mapping[str, Any]
    reference: Callable[..., Any] | None = None
    """What a call must give if it is taken. None: no numbers come out."""
    tolerance: float = 1e-4


def attempt(name: str, door: Door, changed: Mapping[str, Any]) -> None:
    """Call with these arguments in the place of the right ones: an error of ours, or the right numbers."""
    arguments = {**door.given, **changed}
    shown = {key: _shown(value) for key, value in changed.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = door.call(**arguments)
    except nar.RewriteError as error:
        assert len(str(error)) > 20 and "Traceback" not in str(error), f"{shown}: {error}"
        CALLS[f"{name}: refused"] += 1
        return
    except (RuntimeError, TypeError, ValueError, NotImplementedError, OverflowError) as error:
        # The dispatcher of torch checks the types of the schema before any code of ours. It names operator and argument.
        told = str(error)
        assert "neuron_attn::" in told, f"{shown}: raw {type(error).__name__}: {told[:300]}"
        CALLS[f"{name}: refused by the schema"] += 1
        return
    CALLS[f"{name}: taken"] += 1
    if door.reference is None:
        return
    wanted = door.reference(**arguments)
    for new, old in zip(pytree.tree_leaves(result), pytree.tree_leaves(wanted), strict=True):
        assert new.shape == old.shape, f"{shown}: {new.shape}, not {old.shape}"
        if new.is_meta or not new.numel():
            continue
        half = new.dtype in (torch.float16, torch.bfloat16)
        assert new.isfinite().all() and relative_error(new, old) < (3e-2 if half else door.tolerance), f"{shown}: wrong"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} {value.device} {value.flatten()[:4].tolist() if value.layout is torch.strided and not value.is_meta else ''}"
    return repr(value)[:200]


def explore(name: str, door: Door, examples: int, extra: Mapping[str, list[Any]] | None = None) -> None:
    """Draw this many calls, with one argument changed, or two."""
    pools = {key: [*(extra or {}).get(key, []), *others(value)] for key, value in door.given.items()}

    @settings(CALLED, max_examples=examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(pools)), min_size=1, max_size=2, unique=True))
        picked = {key: data.draw(st.integers(0, len(pools[key]) - 1)) for key in keys}
        attempt(name, door, {key: pools[key][i] for key, i in picked.items()})

    run()


# The operators


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scale: float, bias: Any = None, softcap: Any = None,
              sink: Any = None, empty_rows: str = "zero") -> Tensor:  # fmt: skip
    """In float64, with a mask [batch | 1, heads | 1, q_len, kv_len]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.mT * float(scale)
    scores = scores if softcap is None else float(softcap) * torch.tanh(scores / float(softcap))
    scores = scores if bias is None else scores + bias.double()
    scores = scores.masked_fill(~seen, -torch.inf)
    one_more = (
        scores
        if sink is None
        else torch.cat([scores, sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)], 3)
    )
    empty = (scores == -torch.inf).all(3, keepdim=True)
    weights = one_more.softmax(3)[..., : scores.shape[3]].masked_fill(empty, 0)
    out = weights @ v
    if empty_rows == "mean" and v.shape[2]:
        out = torch.where(empty, v.mean(2, keepdim=True), out)
    return out


def flash_reference(query: Tensor, key: Tensor, value: Tensor, *, band_lower: Any, band_upper: Any, key_padding: Any,
                    bounds: Any, **terms: Any) -> Tensor:  # fmt: skip
    used = {name: terms[name] for name in ("scale", "bias", "softcap", "sink", "empty_rows")}
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    if band_lower is not None:
        seen = seen & (j >= i + max(-(2**40), min(band_lower, 2**40)))
    if band_upper is not None:
        seen = seen & (j <= i + max(-(2**40), min(band_upper, 2**40)))
    if key_padding is not None:
        seen = seen & key_padding[:, None, None]
    if bounds is not None:
        seen = seen & (bounds[:, None, :, :1] <= j) & (j < bounds[:, None, :, 1:])
    return attention(query, key, value, seen, **used)


FLASH = {
    "query": random(2, 4, 6, 8),
    "key": random(2, 2, 7, 8),
    "value": random(2, 2, 7, 5, seed=1),
    "scale": 0.3,
    "band_lower": -3,
    "band_upper": 2,
    "key_padding": torch.tensor([[True] * 7, [False, True, True, True, True, False, True]]),
    "bounds": torch.tensor([[0, 7], [1, 7], [0, 5], [0, 7], [3, 3], [2, 7]])[None].expand(2, 6, 2).contiguous(),
    "bias": random(2, 4, 6, 7, seed=2),
    "softcap": 5.0,
    "sink": random(4),
    "empty_rows": "zero",
    "strategy": "UNSHARDED_KERNEL",
    "lnc": 1,
    "kernel_name": "flash_fwd",
    "orders": "BHSD,BHSD,BHSD,BHSD",
}
WORDS = {"empty_rows": ["mean"], "strategy": ["SHARDED_KERNEL", "NONE"], "kernel_name": ["attention_cte"]}


def with_gradients(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    bias_grad = options.pop("bias_grad")
    grads = OPS.flash_bwd(options.pop("grad"), query, key, value, bias_grad=bias_grad, **options)
    return grads[:3]


def backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias_grad: bool, lnc: int, **options: Any
) -> Any:
    if query.is_meta:
        return query, key, value
    operands = [t.detach().double().requires_grad_() for t in (query, key, value)]
    out = flash_reference(*operands, **options)
    return torch.autograd.grad(out, operands, grad.double())


BACKWARD = {"grad": random(2, 4, 6, 5), **{k: v for k, v in FLASH.items() if k not in ("strategy", "kernel_name", "orders")}, "bias_grad": True}  # fmt: skip


def flash_or_meta(**options: Any) -> Any:
    if options["query"].is_meta:
        return options["query"].new_empty(*options["query"].shape[:3], options["value"].shape[3])
    return flash_reference(**options)


PRIOR = {
    "query": random(2, 4, 3, 8),
    "key": random(2, 2, 3, 8),
    "value": random(2, 2, 3, 5, seed=1),
    "key_prior": random(2, 2, 9, 8, seed=2),
    "value_prior": random(2, 2, 9, 5, seed=3),
    "prior_lengths": torch.tensor([4, 9]),
    "scale": 0.3,
    "window": 6,
    "prior_mask": random(2, 9, seed=4) > -1,
    "new_mask": random(2, 3, seed=5) > -1,
    "softcap": 5.0,
    "sink": random(4),
    "lnc": 1,
}


def prior_reference(query: Tensor, key: Tensor, value: Tensor, key_prior: Tensor, value_prior: Tensor, prior_lengths: Tensor,
                    window: Any, prior_mask: Any, new_mask: Any, lnc: int, **terms: Any) -> Tensor:  # fmt: skip
    batch, _, q_len, _ = query.shape
    capacity = key_prior.shape[2]
    seen = torch.zeros(batch, 1, q_len, capacity + q_len, dtype=torch.bool)
    for b in range(batch):
        length = int(prior_lengths[b % len(prior_lengths)])
        for i in range(q_len):
            first = -(2**60) if window is None else length + i - window + 1
            for j in range(length):
                shown = prior_mask is None or bool(prior_mask[b % len(prior_mask), j])
                seen[b, 0, i, j] = shown and j >= first
            for j in range(i + 1):
                shown = new_mask is None or bool(new_mask[b % len(new_mask), j])
                seen[b, 0, i, capacity + j] = shown and length + j >= first
    return attention(query, torch.cat([key_prior, key], 2), torch.cat([value_prior, value], 2), seen, **terms)


REQUESTS = {
    "query_lens": (3, 5),
    "context_lens": (40, 64),
    "block_tables": ((0, 1), (2, 3)),
    "block_size": 32,
    "kv_tile": 128,
    "window": None,
    "q_len": None,
    "tiles": None,
    "kv_tiles": None,
}
CACHES = random(4, 2, 32, 8), random(4, 2, 32, 5, seed=1)
NEW = random(1, 4, 8, 8), random(1, 2, 8, 8), random(1, 2, 8, 5, seed=1)


def by_requests(
    query_lens: Any, context_lens: Any, block_tables: Any, block_size: int, window: Any, q_len: Any, **sizes: Any
) -> Any:
    """The attention of each request alone, with what a schedule says for padding: zeros."""
    query_lens, context_lens, block_tables = (
        x.tolist() if isinstance(x, Tensor) else x for x in (query_lens, context_lens, block_tables)
    )
    out, start = torch.zeros(1, 4, 8, 5, dtype=torch.float64), 0
    for rows, context, table in zip(query_lens, context_lens, block_tables, strict=True):
        blocks = list(table)[: -(-context // block_size)]
        k, v = (c[blocks].transpose(0, 1).flatten(1, 2)[None, :, :context] for c in CACHES)
        q, new_k, new_v = (t[:, :, start : start + rows] for t in NEW)
        i, j = torch.arange(rows)[:, None] + context, torch.arange(context + rows)
        seen = (j <= i) & (j > i - (2**40 if window is None else min(int(window), 2**40)))
        out[:, :, start : start + rows] = attention(
            q, torch.cat([k, new_k], 2), torch.cat([v, new_v], 2), seen[None, None], scale=0.3
        )
        start += rows
    return out


def scheduled(**options: Any) -> Tensor:
    """What flash_paged gives by a schedule for these requests, whose rows lie in the first rows of 8."""
    schedule = make_schedule(**{"q_len": 8} | {k: v for k, v in options.items() if k != "q_len" or v is not None})
    return OPS.flash_paged(*NEW, *CACHES, *(getattr(schedule, f.name) for f in dataclasses.fields(Schedule)), scale=0.3)


GOOD = make_schedule((3, 5), (40, 64), ((0, 1), (2, 3)), 32, kv_tile=128)
PAGED = {
    **dict(zip(("query", "key", "value", "key_cache", "value_cache"), (*NEW, *CACHES), strict=True)),
    **{f.name: getattr(GOOD, f.name) for f in dataclasses.fields(Schedule)},
    "scale": 0.3,
    "softcap": 5.0,
    "sink": random(4),
    "lnc": 1,
    "kernel_name": "flash_paged",
}


def paged_reference(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, tile_q: Tensor, tile_kv: Tensor,
                    kv_blocks: Tensor, tile_bounds: Tensor, active_bounds: Tensor, lnc: int, kernel_name: str, **terms: Any) -> Tensor:  # fmt: skip
    """By the meaning of the schedule: a row sees each column of each of its tiles that is within its bounds."""
    size, q_len = key_cache.shape[2], query.shape[2]
    keys, values = [key], [value]
    seen = [((active_bounds[:, :1] <= torch.arange(q_len)) & (torch.arange(q_len) < active_bounds[:, 1:])).tril()]
    for t in range(len(tile_q)):
        blocks = kv_blocks[tile_kv[t]]
        for place, block in enumerate(blocks.tolist()):
            columns = torch.arange(place * size, (place + 1) * size)
            rows = torch.zeros(q_len, size, dtype=torch.bool)
            for i in range(q_len):
                if int(tile_q[t]) == i // 128:
                    lo, hi = tile_bounds[t, i % 128].tolist()
                    rows[i] = (lo <= columns) & (columns < hi)
            seen.append(rows)
            keys.append(key_cache[max(block, 0)][None])
            values.append(value_cache[max(block, 0)][None])
    return attention(query, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(seen, 1)[None, None], **terms)


OPERATORS: dict[str, tuple[Door, int]] = {
    "flash_fwd": (Door(OPS.flash_fwd, FLASH, lambda **o: flash_in_order(**o)), 250),
    "flash_bwd": (Door(with_gradients, BACKWARD, backward_reference, 1e-3), 100),
    "flash_prior": (Door(OPS.flash_prior, PRIOR, lambda **o: prior_or_meta(**o)), 150),
    "flash_paged": (Door(OPS.flash_paged, PAGED, lambda **o: paged_or_meta(**o)), 150),
    "make_schedule": (Door(scheduled, REQUESTS, by_requests), 250),
}


def flash_in_order(orders: str, **options: Any) -> Tensor:
    names = ("query", "key", "value")
    kinds = orders.split(",")
    moves = {"BHSD": (0, 1, 2, 3), "BSHD": (0, 2, 1, 3), "BHDS": (0, 1, 3, 2)}
    back = {"BHSD": (0, 1, 2, 3), "BSHD": (0, 2, 1, 3), "BHDS": (0, 1, 3, 2)}
    plain = {n: options[n].permute(moves[k.strip()]) for n, k in zip(names, kinds[:3], strict=True)}
    return flash_or_meta(**{**options, **plain}).permute(back[kinds[3].strip()])


def prior_or_meta(**options: Any) -> Tensor:
    query = options["query"]
    return query.new_empty(*query.shape[:3], options["value"].shape[3]) if query.is_meta else prior_reference(**options)


def paged_or_meta(**options: Any) -> Tensor:
    query = options["query"]
    return query.new_empty(*query.shape[:3], options["value"].shape[3]) if query.is_meta else paged_reference(**options)


@pytest.mark.parametrize("name", OPERATORS)
def test_bad_operands(name: str) -> None:
    door, examples = OPERATORS[name]
    attempt(name, door, {})
    assert CALLS[f"{name}: taken"] == 1, "the call is right as it is"
    explore(name, door, examples, WORDS)


# The functions


class Model(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = True, pair: Any = None) -> Tensor:
        x = x if pair is None else x + pair[0] * pair[1]
        return nn.functional.scaled_dot_product_attention(x, x, x, mask, is_causal=causal and mask is None)


X, MASK = random(1, 2, 6, 4), random(1, 1, 6, 6) > -1
EXAMPLE: dict[str, Any] = {"args": (X,), "kwargs": {"mask": MASK, "causal": False}}
BAD_MODELS: list[Any] = [
    None,
    3,
    "bert",
    Model,
    lambda x: x,
    torch.jit.ScriptModule(),
    [Model()],
    X,
    nn.Identity(),
    nn.Linear(4, 4),
]
EXAMPLES: list[Any] = [
    None, 3, "x", (), (None,), (X, X, X, X), [X], {"x": X}, (X[0],), (X.long(),), (X.to("meta"),), ((X,),), (X[:, :, :0],), X, object(), (object(),),
    (X.requires_grad_(False).numpy(),), (X.to_sparse(),), (X.half(),), ("x",), ({"x": X},), (X.expand(3, 2, 6, 4),),
]  # fmt: skip
NAMED: list[Any] = [
    None, 3, "x", (X,), {"x": X}, {"y": X}, {"mask": 3}, {"mask": MASK[0]}, {"mask": MASK.float()}, {"mask": MASK[..., :3]}, {3: X},
    {"mask": MASK.to("meta")}, {"mask": "text"}, {"causal": None}, {"causal": MASK}, {"pair": 3}, {"pair": [X, 2.0]}, {"pair": {0: X}},
    {"pair": (X, object())}, {"mask": [MASK]}, {"causal": "yes"},
]  # fmt: skip
SHAPES: list[Any] = [
    3, "x", [], (), {}, {"x": 3}, {"x": {7: torch.export.Dim("a")}}, {"x": {2: "a"}}, {"y": {0: torch.export.Dim("a")}}, {"x": {2: 99}},
    {"x": {2: torch.export.Dim("b", min=90)}}, {"x": {2: torch.export.Dim.AUTO}}, ({2: torch.export.Dim("c")},), {"x": [None]}, {"x": {-1: torch.export.Dim("d")}},
    {"x": {2: torch.export.Dim("e")}, "mask": {2: torch.export.Dim("e")}}, {"x": {2: object()}}, {0: None}, {"x": {"2": torch.export.Dim("f")}},
    {"x": {2: torch.export.Dim("g", min=2, max=3)}}, {"x": {2: torch.export.Dim.DYNAMIC}, "mask": None, "causal": None},
]  # fmt: skip
CONFIGS: list[Any] = [
    3,
    "always",
    {},
    nar.RewriteConfig,
    {"policy": "always"},
    nar.RewriteConfig(policy="always", require=7),
]


def rewritten(model: Any, args: Any, kwargs: Any, config: Any, dynamic_shapes: Any) -> Any:
    module = nar.rewrite(model, args, kwargs, config=config, dynamic_shapes=dynamic_shapes)
    return module(*_called(args), **(kwargs or {}))


def _called(args: Any) -> Any:
    return (args,) if isinstance(args, Tensor) else args


def own_result(model: Any, args: Any, kwargs: Any, config: Any, dynamic_shapes: Any) -> Any:
    return model(*_called(args), **(kwargs or {}))


REWRITE = Door(
    rewritten,
    {"model": Model(), **EXAMPLE, "config": nar.RewriteConfig(policy="always"), "dynamic_shapes": None},
    own_result,
)
POOLS = {"model": BAD_MODELS, "args": EXAMPLES, "kwargs": NAMED, "config": CONFIGS, "dynamic_shapes": SHAPES}


def explained(model: Any, args: Any, kwargs: Any, config: Any) -> None:
    report = nar.explain(model, *args, config=config, **kwargs)
    assert isinstance(report, nar.RewriteReport)


def traced(model: Any, args: Any, config: Any) -> Any:
    return nar.rewrite_for_trace(model, args, config)(*(args.values() if isinstance(args, dict) else _called(args)))


def traced_result(model: Any, args: Any, config: Any) -> Any:
    return model(**args) if isinstance(args, dict) else model(*_called(args))


def chosen(door: Door, pools: Mapping[str, list[Any]], name: str, examples: int) -> None:
    @settings(CALLED, max_examples=examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(pools)), min_size=1, max_size=1))
        picked = {key: data.draw(st.integers(0, len(pools[key]) - 1)) for key in keys}
        attempt(name, door, {key: pools[key][i] for key, i in picked.items()})

    run()


def test_bad_calls_of_rewrite() -> None:
    attempt("rewrite", REWRITE, {})
    chosen(REWRITE, POOLS, "rewrite", 70)


def test_bad_calls_of_explain() -> None:
    given = {"model": Model(), "args": (X,), "kwargs": {"mask": MASK, "causal": False}, "config": None}
    named = [kw for kw in NAMED if isinstance(kw, dict) and all(isinstance(k, str) for k in kw)]
    pools = {
        "model": BAD_MODELS,
        "args": [a for a in EXAMPLES if isinstance(a, tuple)],
        "kwargs": named,
        "config": CONFIGS,
    }
    chosen(Door(explained, given), pools, "explain", 30)


def test_bad_calls_of_rewrite_for_trace() -> None:
    door = Door(
        traced, {"model": Model(), "args": (X, MASK), "config": nar.RewriteConfig(policy="always")}, traced_result
    )
    pools = {"model": BAD_MODELS, "args": [*EXAMPLES, *NAMED], "config": CONFIGS}
    chosen(door, pools, "rewrite_for_trace", 30)


def test_bad_calls_of_a_rewritten_module() -> None:
    module = nar.rewrite(Model(), (X,), {"mask": MASK, "causal": False}, config=nar.RewriteConfig(policy="always"))
    door = Door(
        lambda args, kwargs: module(*_called(args), **kwargs),
        EXAMPLE,
        lambda args, kwargs: Model()(*_called(args), **kwargs),
    )
    named = [kw for kw in NAMED if isinstance(kw, dict) and all(isinstance(k, str) for k in kw)]
    pools = {
        "args": [a for a in EXAMPLES if isinstance(a, (tuple, Tensor))],
        "kwargs": [{**EXAMPLE["kwargs"], **kw} for kw in named],
    }
    chosen(door, pools, "module", 100)


def test_bad_fields_of_a_configuration() -> None:
    fields = {f.name: getattr(nar.RewriteConfig(), f.name) for f in dataclasses.fields(nar.RewriteConfig)}
    words: list[Any] = [
        "trn9",
        "ALWAYS",
        "2.99",
        "all ",
        "NONE",
        {"a": 1},
        {1: 2},
        {torch.float32: "x"},
        {torch.float32: math.nan},
        {"float32": 1e-3},
    ]
    everything = [*NUMBERS, *OTHERS, *words, ("flash",), ({"bad": 1},), ({},), torch.ones(2)]

    def made(**options: Any) -> None:
        config = nar.RewriteConfig(**options)
        hash(config)
        assert dataclasses.replace(config) == config

    explore("RewriteConfig", Door(made, fields), 400, dict.fromkeys(fields, everything))


def test_bad_words_for_reports() -> None:
    report = nar.explain(Model(), X)
    texts: list[Any] = [
        "",
        "{}",
        "[]",
        "null",
        "3",
        report.to_json()[:-9],
        report.to_json().replace('"sites"', '"sights"'),
        None,
        3,
        b"\xff",
        object(),
    ]
    attempt("from_json", Door(nar.RewriteReport.from_json, {"text": report.to_json()}), {})
    for text in texts:
        attempt("from_json", Door(nar.RewriteReport.from_json, {"text": text}), {})
    for site in ("nothing", 7, -9, None, 1.5, object()):
        attempt("reproducer", Door(report.reproducer, {"site": site}), {})
    for name in ("", "sdpa", 3, None, "a|b"):
        attempt("register", Door(nar.register_with_transformers, {"name": name}), {})
    for config in CONFIGS[:-1]:
        attempt("register", Door(nar.register_with_transformers, {"config": config}), {})
    for place in ("/no/such/file", 3, None, "."):
        attempt("load", Door(nar.RewrittenModule.load, {"path": place}), {})


def test_that_enough_was_called() -> None:
    """In the order of this file: what was refused, and how much."""
    if sum(CALLS.values()) > 100:  # not alone in a process
        assert sum(count for name, count in CALLS.items() if "refused" in name) >= 500, CALLS
