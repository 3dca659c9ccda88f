"""`flash_prior` and `flash_paged`: on the CPU, as every other device computes them, and through their NKI kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.kernels.schedule import Schedule, make_schedule
from neuron_attn_rewrite.ops import simulated
from neuron_attn_rewrite.ops.paged import FlashPaged
from neuron_attn_rewrite.ops.prior import FlashPrior
from tests.ops.test_flash_fwd import relative_error

flash_prior = torch.ops.neuron_attn.flash_prior.default
flash_paged = torch.ops.neuron_attn.flash_paged.default
MAGNITUDE = 2.5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def on_simulator(op: Callable[..., Tensor], target: str) -> Callable[..., Tensor]:
    def call(*args: Any, **options: Any) -> Tensor:
        with simulated.simulated(target):
            return op(*args, **options)

    return call


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * MAGNITUDE).to(dtype)


def token_by_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """One head's rows [rows, head_dim] in float64; seen: bool [rows, keys]. Zeros where nothing is seen."""
    scores = scale * query.double() @ keys.double().T
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * seen
    if scores.numel():
        weights = (scores - scores.amax()).exp() * seen
        extra = 0.0 if sink is None else (sink.double() - scores.amax()).exp()
        weights = torch.nan_to_num(weights / (weights.sum(-1, keepdim=True) + extra))
    return weights @ values.double()


# flash_prior


@dataclass(frozen=True)
class Cache:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 3
    capacity: int = 200
    head_dim: int = 16
    v_head_dim: int = 16

    def tensors(self, lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        b, k, d, v = self.batch, self.kv_heads, self.head_dim, self.v_head_dim
        shapes = [(b, self.heads, self.q_len, d)]
        shapes += [(b, k, n, size) for n in (self.q_len, self.capacity) for size in (d, v)]
        return *(normal(*shape, dtype=dtype) for shape in shapes), torch.tensor(lengths)


def expected_prior(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_prior: Tensor,
    value_prior: Tensor,
    prior_lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prior_mask: Tensor | None = None,
    new_mask: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """The sequence put together, token by token."""
    batch, heads, q_len, _ = query.shape
    out = torch.zeros(batch, heads, q_len, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        length = int(prior_lengths[b if len(prior_lengths) > 1 else 0])
        at = torch.arange(length + q_len)
        rows = length + torch.arange(q_len)[:, None]
        seen = at <= rows
        if window is not None:
            seen &= at > rows - window
        if prior_mask is not None:
            mask = prior_mask[b if len(prior_mask) > 1 else 0]
            seen &= torch.cat([mask[:length], torch.ones(q_len, dtype=torch.bool)])
        if new_mask is not None:
            mask = new_mask[b if len(new_mask) > 1 else 0]
            seen &= torch.cat([torch.ones(length, dtype=torch.bool), mask])
        for h in range(heads):
            g = h // (heads // key.shape[1])
            keys = torch.cat([key_prior[b, g, :length], key[b, g]])
            values = torch.cat([value_prior[b, g, :length], value[b, g]])
            share = None if sink is None else sink[h]
            out[b, h] = token_by_token(query[b, h], keys, values, seen, scale=scale, softcap=softcap, sink=share)
    return out


PRIOR: dict[str, Callable[..., Tensor]] = {
    "cpu": flash_prior,
    "decomposed": lambda *tensors, **options: FlashPrior(*tensors, **options).decomposed(),
    "gen3": on_simulator(flash_prior, "gen3"),
    "gen4": on_simulator(flash_prior, "gen4"),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_token_generation_and_prefixes(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 8), (3, 1)]))
    sizes = Cache(
        data.draw(st.integers(1, 2)),
        kv_heads * group,
        kv_heads,
        data.draw(st.one_of(st.integers(1, 8), st.sampled_from([100, 130]))),
        data.draw(st.sampled_from([1, 127, 128, 300, 700])),
        data.draw(st.sampled_from([8, 40, 160])),
        data.draw(st.sampled_from([8, 40])),
    )
    lengths = [data.draw(st.integers(0, sizes.capacity)) for _ in range(sizes.batch)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensors = sizes.tensors(lengths, dtype)
    options: dict[str, Any] = {"scale": data.draw(st.sampled_from([0.1, -0.3]))}
    if data.draw(st.booleans()):
        options["window"] = data.draw(st.sampled_from([1, 2, 127, 128, 129, 256]))
    if data.draw(st.booleans()):
        options["prior_mask"] = torch.rand(sizes.batch, sizes.capacity) < 0.7
    if data.draw(st.booleans()):
        options["new_mask"] = torch.rand(data.draw(st.sampled_from([1, sizes.batch])), sizes.q_len) < 0.7
    if data.draw(st.booleans()):
        options["sink"] = torch.randn(sizes.heads) * 3
    if data.draw(st.integers(0, 3)) == 0:
        options["softcap"] = 5.0
    want = expected_prior(*tensors, **options)
    lnc = data.draw(st.sampled_from([1, 2]))
    for name, implementation in PRIOR.items():
        out = implementation(*tensors, **options, lnc=lnc)
        assert out.shape == want.shape and out.dtype == dtype
        assert relative_error(out, want) <= TOLERANCES[dtype], name


def test_what_lies_behind_the_length_does_not_matter() -> None:
    sizes = Cache(capacity=300)
    tensors = list(sizes.tensors([130, 7]))
    want = flash_prior(*tensors, scale=0.3)
    for b, length in enumerate((130, 7)):
        for cache in tensors[3:5]:
            cache[b, :, length:] = 1e4
    for name, implementation in PRIOR.items():
        assert relative_error(implementation(*tensors, scale=0.3), want.double()) <= TOLERANCES[torch.float32], name


def test_a_group_of_heads_reads_the_cache_once() -> None:
    sizes = Cache(1, 8, 1, 4, 1024, 64, 64)
    tensors = sizes.tensors([1000], torch.bfloat16)
    launch = FlashPrior(*tensors, scale=0.3).launch()
    trace = simulated.run(launch, "gen3")[1]
    cache = 2 * 1024 * 64 * 2
    rows = 8 * 4
    # The rows themselves are read once for the cache and once for the new keys.
    assert trace.hbm_read == cache + 2 * 4 * 64 * 2 + 2 * rows * 64 * 2 + 2 * rows * 2 * 4
    assert sum(i.op == "range_select" for i in trace.instructions) == 3


def test_gradients_are_those_of_all_keys_together() -> None:
    tensors, sink = Cache().tensors([0, 130]), torch.randn(4)
    options = {"scale": 0.3, "window": 100, "prior_mask": torch.rand(2, 200) < 0.7, "new_mask": torch.rand(1, 3) < 0.7}
    grad = normal(2, 4, 3, 16)
    found = []
    for op in (flash_prior, PRIOR["decomposed"]):
        given = [t.clone().requires_grad_() for t in (*tensors[:5], sink)]
        op(*given[:5], tensors[5], **options, sink=given[5]).backward(grad)
        found.append([t.grad for t in given])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and relative_error(a, b) <= TOLERANCES[torch.float32]
    tangents = [normal(*t.shape) for t in tensors[:5]]

    def forward(op: Callable[..., Tensor]) -> Tensor:
        done: Tensor = torch.func.jvp(lambda *t: op(*t, tensors[5], **options), tensors[:5], tuple(tangents))[1]
        return done

    assert relative_error(forward(flash_prior), forward(PRIOR["decomposed"])) <= TOLERANCES[torch.float32]


def test_lengths_are_checked_where_gradients_are_recorded_too() -> None:
    query, *others = Cache().tensors([5, 201])
    for rows in (query, query.clone().requires_grad_()):
        with pytest.raises(InputError, match=r"prior_lengths must lie in \[0, 200\]"):
            flash_prior(rows, *others, scale=0.3)


def test_autocast_casts_operands_of_different_dtypes_alone() -> None:
    tensors = Cache().tensors([5, 100])
    mixed = [t.bfloat16() if i < 3 else t for i, t in enumerate(tensors)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flash_prior(*tensors, scale=0.3), FlashPrior(*tensors, scale=0.3).on_cpu())
        out = flash_prior(*mixed, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected_prior(*tensors, scale=0.3)) <= 4 * TOLERANCES[torch.bfloat16]


def test_a_hidden_key_of_the_cache_that_is_no_number() -> None:
    """What is hidden does not count, even if it is NaN."""
    tensors, options = Cache().tensors([5, 100]), {"scale": 0.3, "prior_mask": (torch.arange(200) != 3)[None]}
    want = expected_prior(*tensors, **options)
    tensors[3][:, :, 3] = torch.nan
    assert relative_error(flash_prior(*tensors, **options), want) <= TOLERANCES[torch.float32]


# flash_paged


@dataclass(frozen=True)
class Batch:
    """Requests with their new and cached tokens, in a cache of shuffled blocks."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_size: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    spare_rows: int = 0

    def tables(self) -> list[list[int]]:
        counts = [-(-c // self.block_size) for c in self.context_lens]
        order = iter((torch.randperm(sum(counts)) + 1).tolist())
        return [[next(order) for _ in range(n)] for n in counts]

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        blocks = 2 + sum(-(-c // self.block_size) for c in self.context_lens)
        rows = sum(self.query_lens) + self.spare_rows
        return (
            normal(1, self.heads, rows, self.head_dim, dtype=dtype),
            normal(1, self.kv_heads, rows, self.head_dim, dtype=dtype),
            normal(1, self.kv_heads, rows, self.v_head_dim, dtype=dtype),
            normal(blocks, self.kv_heads, self.block_size, self.head_dim, dtype=dtype),
            normal(blocks, self.kv_heads, self.block_size, self.v_head_dim, dtype=dtype),
        )


def fields(schedule: Schedule) -> tuple[Tensor, ...]:
    return schedule.tile_q, schedule.tile_kv, schedule.kv_blocks, schedule.tile_bounds, schedule.active_bounds


def expected_paged(
    batch: Batch,
    tables: list[list[int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Each request by itself."""
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=torch.float64)
    row = 0
    for new, context, table in zip(batch.query_lens, batch.context_lens, tables, strict=True):
        rows = slice(row, row + new)
        at, i = torch.arange(context + new), context + torch.arange(new)[:, None]
        seen = at <= i
        if window is not None:
            seen &= at > i - window
        for h in range(batch.heads):
            g = h // (batch.heads // batch.kv_heads)
            keys, values = (
                torch.cat([cache[table, g].flatten(0, 1)[:context], fresh[0, g, rows]])
                for cache, fresh in ((key_cache, key), (value_cache, value))
            )
            share = None if sink is None else sink[h]
            out[0, h, rows] = token_by_token(
                query[0, h, rows], keys, values, seen, scale=scale, softcap=softcap, sink=share
            )
        row += new
    return out


PAGED: dict[str, Callable[..., Tensor]] = {
    "cpu": flash_paged,
    "decomposed": lambda *tensors, **options: FlashPaged(*tensors, **options).decomposed(),
    "gen3": on_simulator(flash_paged, "gen3"),
    "gen4": on_simulator(flash_paged, "gen4"),
}
BATCHES = {
    "one request": Batch((150,), (300,)),
    "no cache": Batch((20, 30), (0, 0)),
    "decoding": Batch((1,) * 9, (5, 0, 700, 64, 32, 33, 1, 130, 255)),
    "several": Batch((100, 1, 60, 130), (37, 600, 0, 128), spare_rows=20),
    "small blocks": Batch((70, 80), (200, 90), block_size=16, heads=3, kv_heads=3, head_dim=40, v_head_dim=24),
    "one kv head": Batch((40, 30), (200, 90), block_size=128, heads=3, kv_heads=1, head_dim=136, v_head_dim=160),
}


@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 5.0, "sink": True}], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_requests_by_schedule(name: str, options: dict[str, Any]) -> None:
    batch = BATCHES[name]
    for dtype, lnc in ((torch.float32, 1), (torch.bfloat16, 2)):
        tensors, tables = batch.tensors(dtype), batch.tables()
        terms = {"scale": 0.2, **options}
        if "sink" in options:
            terms["sink"] = torch.randn(batch.heads) * 3
        want = expected_paged(batch, tables, *tensors, **terms)
        window = terms.pop("window", None)
        rows = tensors[0].shape[2]
        schedule = make_schedule(
            batch.query_lens, batch.context_lens, tables, batch.block_size, kv_tile=256, window=window, q_len=rows
        )
        for which, implementation in PAGED.items():
            out = implementation(*tensors, *fields(schedule), **terms, lnc=lnc)
            assert out.dtype == dtype and relative_error(out, want) <= TOLERANCES[dtype], which


def test_a_schedule_of_a_fixed_size() -> None:
    batch = BATCHES["several"]
    tensors, tables = batch.tensors(), batch.tables()
    rows = tensors[0].shape[2]
    schedule = make_schedule(
        batch.query_lens, batch.context_lens, tables, 32, kv_tile=128, q_len=rows, tiles=20, kv_tiles=9
    )
    assert schedule.tile_q.shape == (20,) and schedule.kv_blocks.shape == (9, 4)
    want = expected_paged(batch, tables, *tensors, scale=0.2)
    for which, implementation in PAGED.items():
        out = implementation(*tensors, *fields(schedule), scale=0.2)
        assert relative_error(out, want) <= TOLERANCES[torch.float32], which


def test_more_new_keys_than_fit() -> None:
    """Several sections of new keys: what a row has gathered goes from one to the next."""
    batch = Batch((150, 200), (70, 0))
    tensors, tables = batch.tensors(), batch.tables()
    schedule = make_schedule(batch.query_lens, batch.context_lens, tables, 32, kv_tile=128)
    made = FlashPaged(*tensors, *fields(schedule), scale=0.2).launch()
    out, _ = simulated.run(replace(made, static={**made.static, "section": 128}), "gen3")
    assert relative_error(out, expected_paged(batch, tables, *tensors, scale=0.2)) <= TOLERANCES[torch.float32]


def test_empty_tiles_are_left_out_and_keys_loaded_once() -> None:
    batch = Batch((256, 256), (512, 512), block_size=128, heads=1, kv_heads=1)
    schedule = make_schedule(batch.query_lens, batch.context_lens, batch.tables(), 128, kv_tile=256, tiles=10)
    assert list(zip(schedule.tile_kv.tolist(), schedule.tile_q.tolist(), strict=True)) == [
        *[(kv, q) for kv in (0, 1) for q in (0, 1)],
        *[(kv, q) for kv in (2, 3) for q in (2, 3)],
        (3, 0),
        (3, 0),
    ]
    assert schedule.loads == 4
    tensors = batch.tensors(torch.bfloat16)
    launch = FlashPaged(*tensors, *fields(schedule), scale=0.2).launch()
    full = FlashPaged(*tensors, *fields(schedule), scale=0.2).launch()
    assert int((launch.tensors["kv_rows"] < len(full.tensors["k_cache"])).sum()) == 4 * 256
    window = make_schedule(batch.query_lens, batch.context_lens, batch.tables(), 128, kv_tile=256, window=100)
    assert list(zip(window.tile_kv.tolist(), window.tile_q.tolist(), strict=True)) == [(1, 0), (3, 2)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_every_pair_of_row_and_key_is_in_the_schedule_once(data: st.DataObject) -> None:
    requests = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 200)), min_size=1, max_size=4))
    query_lens, context_lens = zip(*requests, strict=True)
    window = data.draw(st.sampled_from([None, 1, 60, 300]))
    batch = Batch(query_lens, context_lens, block_size=data.draw(st.sampled_from([16, 64])))
    tables = batch.tables()
    schedule = make_schedule(query_lens, context_lens, tables, batch.block_size, kv_tile=128, window=window)
    seen: list[tuple[int, int, int]] = []
    for t in range(len(schedule.tile_q)):
        for p in range(128):
            lo, hi = schedule.tile_bounds[t, p].tolist()
            for column in range(lo, hi):
                block = int(schedule.kv_blocks[schedule.tile_kv[t], column // batch.block_size])
                seen.append((int(schedule.tile_q[t]) * 128 + p, block, column % batch.block_size))
    want, row = set(), 0
    for new, context, table in zip(query_lens, context_lens, tables, strict=True):
        for i in range(new):
            for j in range(context):
                if window is None or j > context + i - window:
                    want.add((row + i, table[j // batch.block_size], j % batch.block_size))
            first = 0 if window is None else max(0, i + 1 - window)
            assert schedule.active_bounds[row + i].tolist() == [row + first, row + i + 1]
        row += new
    assert len(seen) == len(want) and set(seen) == want


# Both


def test_launches_are_made_without_a_look_at_any_value() -> None:
    tensors = [t.to("meta") for t in Cache().tensors([5, 100])]
    mask = torch.ones(2, 200, dtype=torch.bool, device="meta")
    made = [FlashPrior(*tensors, scale=0.3, window=7, prior_mask=mask, new_mask=mask[:, :3]).launch()]
    batch = Batch((20, 30), (40, 70))
    schedule = make_schedule(batch.query_lens, batch.context_lens, batch.tables(), 32, kv_tile=128)
    tensors = [t.to("meta") for t in (*batch.tensors(), *fields(schedule))]
    made.append(FlashPaged(*tensors, scale=0.3, sink=torch.ones(4, device="meta")).launch())
    assert all(t.is_meta and t.is_contiguous() for launch in made for t in launch.tensors.values())


@pytest.mark.parametrize("which", ["prior", "paged"])
def test_torch_agrees_that_these_are_ops(which: str) -> None:
    if which == "prior":
        tensors = Cache().tensors([5, 100])
        torch.library.opcheck(flash_prior, tensors, {"scale": 0.3, "window": 40, "sink": torch.randn(4)})
        return
    batch = Batch((20, 30), (40, 70))
    schedule = make_schedule(batch.query_lens, batch.context_lens, batch.tables(), 32, kv_tile=128)
    torch.library.opcheck(flash_paged, (*batch.tensors(), *fields(schedule)), {"scale": 0.3, "softcap": 4.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior_lengths": torch.zeros(3, dtype=torch.int64)}, "flash_prior: prior_lengths must be int"),
        ({"prior_mask": torch.ones(2, 3, dtype=torch.bool)}, "flash_prior: prior_mask must be bool"),
        ({"new_mask": torch.ones(2, 4, dtype=torch.bool)}, "flash_prior: new_mask must be bool"),
        ({"new_mask": torch.ones(2, 3)}, "flash_prior: new_mask must be bool"),
        ({"value_prior": torch.randn(2, 2, 9, 16)}, "flash_prior: value_prior must have key_prior's capacity 200"),
        ({"key_prior": torch.randn(2, 2, 200, 8)}, "flash_prior: key_prior must be"),
        (
            {"key": torch.randn(2, 2, 4, 16), "value": torch.randn(2, 2, 4, 16)},
            "flash_prior: key must have query's length",
        ),
        ({"window": 0}, "flash_prior: window must be at least 1"),
        ({"softcap": -1.0}, "flash_prior: softcap must be positive"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_arguments_of_flash_prior_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("query", "key", "value", "key_prior", "value_prior", "prior_lengths")
    call = {**dict(zip(names, Cache().tensors([5, 100]), strict=True)), "scale": 0.3, **change}
    with pytest.raises(InputError, match=message):
        flash_prior(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_kv": torch.zeros(9, dtype=torch.int32)}, "flash_paged: tile_kv must be int32"),
        ({"active_bounds": torch.zeros(50, 2)}, "flash_paged: active_bounds must be int32"),
        (
            {"kv_blocks": torch.zeros(1, 1, dtype=torch.int32)},
            "flash_paged: kv_blocks must hold tiles of a multiple of 128",
        ),
        ({"value_cache": torch.randn(9, 2, 32, 16)}, "flash_paged: value_cache must have key_cache's blocks"),
        ({"key_cache": torch.randn(6, 1, 32, 16)}, "flash_paged: key_cache must be"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_arguments_of_flash_paged_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    batch = Batch((20, 30), (40, 70))
    schedule = make_schedule(batch.query_lens, batch.context_lens, batch.tables(), 32, kv_tile=128)
    names = ("query", "key", "value", "key_cache", "value_cache")
    call = {**dict(zip(names, batch.tensors(), strict=True)), **vars(schedule), "scale": 0.3, **change}
    with pytest.raises(InputError, match=message):
        flash_paged(**call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_lens": [1, 2]}, "one entry a request"),
        ({"kv_tile": 200}, "kv_tile=200 must be a multiple"),
        ({"context_lens": [65]}, "request 0 has 65 cached tokens in 2 blocks"),
        ({"q_len": 9}, "q_len=9 is less than the 10 rows"),
        ({"context_lens": [200], "block_tables": [list(range(7))], "kv_tiles": 1}, "kv_tiles=1 is less than the 2"),
        ({"context_lens": [200], "block_tables": [list(range(7))], "tiles": 1}, "tiles=1 is less than the 2"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_schedules_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {
        "query_lens": [10], "context_lens": [64], "block_tables": [[0, 1]], "block_size": 32, "kv_tile": 128
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        make_schedule(**{**fine, **arguments})
