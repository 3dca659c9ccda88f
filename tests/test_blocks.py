"""Attention to a cache in blocks: `cache[block_table]` and a call of `flash_blocks`, or a copy with the reason.

Each model is compared with itself in float64, on tables, lengths and operands that the example does not have. What lies
in blocks that no row sees is large, so that a wrong block shows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from neuron_attn_rewrite import (
    InputError,
    RewriteConfig,
    RewrittenModule,
    rewrite,
    rewrite_for_trace,
    verify_trace,
)
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, relative_error

BATCH, HEADS, KV_HEADS, DIM, BLOCKS, SIZE, COUNT = 3, 4, 2, 16, 24, 8, 5
LENGTH = SIZE * COUNT
COPIES = {f"aten.{name}" for name in ("index", "index_select", "gather", "embedding")}


def repeated(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(HEADS // KV_HEADS, 1)


def by_index(cache: Tensor, table: Tensor) -> Tensor:
    return cache[table].flatten(1, 2).transpose(1, 2)


def by_heads(cache: Tensor, table: Tensor) -> Tensor:
    """[blocks, heads, block_size, dim]."""
    return cache.transpose(1, 2).contiguous()[table].transpose(1, 2).flatten(2, 3)


def by_index_select(cache: Tensor, table: Tensor) -> Tensor:
    return cache.index_select(0, table.flatten()).view(len(table), -1, *cache.shape[2:]).transpose(1, 2)


def by_gather(cache: Tensor, table: Tensor) -> Tensor:
    numbers = table.reshape(-1, 1, 1, 1).expand(-1, *cache.shape[1:])
    return cache.gather(0, numbers).reshape(len(table), -1, *cache.shape[2:]).transpose(1, 2)


def by_embedding(cache: Tensor, table: Tensor) -> Tensor:
    return embedding(table, cache.flatten(1)).view(len(table), -1, *cache.shape[2:]).transpose(1, 2)


def by_last(cache: Tensor, table: Tensor) -> Tensor:
    """The blocks are the last dim but one: [block_size, heads, blocks, dim]."""
    return cache.permute(1, 2, 0, 3)[:, :, table].permute(2, 1, 3, 0, 4).flatten(2, 3)


def by_einsum(cache: Tensor, table: Tensor) -> Tensor:
    pages = cache[table.to(torch.int64)]
    return pages.permute(0, 3, 1, 2, 4).reshape(len(table), cache.shape[2], -1, cache.shape[3])


GATHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": by_index, "heads first": by_heads, "index_select": by_index_select, "gather": by_gather,
    "embedding": by_embedding, "last": by_last, "int32": by_einsum,
}  # fmt: skip


class Paged(nn.Module):
    """Decode: one token sees the keys before its length."""

    def __init__(self, gather: Callable[[Tensor, Tensor], Tensor] = by_index) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = (repeated(self.gather(cache, table)) for cache in (keys, values))
        seen = torch.arange(key.shape[2]) < lengths[:, None, None, None]
        return scaled_dot_product_attention(query, key, value, seen)


def operands(q_len: int = 1, *, seed: int = 0, size: int = SIZE, count: int = COUNT) -> tuple[Tensor, ...]:
    """query, keys, values, table and lengths. One request has a single key."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, q_len, DIM, generator=g) * 3
    keys, values = (torch.randn(BLOCKS, size, KV_HEADS, DIM, generator=g) * 3 for _ in range(2))
    table = torch.randperm(BLOCKS, generator=g)[: BATCH * count].reshape(BATCH, count)
    lengths = torch.randint(1, size * count - q_len + 1, (BATCH,), generator=g)
    lengths[seed % BATCH] = 1
    return query, keys, values, table, lengths


def doubled(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs)


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)


def names(module: RewrittenModule) -> list[str]:
    """The operators of the graph, without their overloads."""
    return [str(node.target).rpartition(".")[0] for node in module.graph.nodes if node.op == "call_function"]


def calls(module: RewrittenModule) -> list[str]:
    found = [name.partition(".")[2] for name in names(module) if name.startswith("neuron_attn.")]
    return [name for name in found if name != "checked_blocks"]


def copies(module: RewrittenModule) -> list[str]:
    """The operators that gather from a cache."""
    return [name for name in names(module) if name in COPIES]


def compare(
    model: nn.Module,
    make: Callable[[int], tuple[Any, ...]],
    config: RewriteConfig = ALWAYS,
    *,
    example: int = 0,
    tries: tuple[int, ...] = (1, 2, 3),
) -> RewrittenModule:
    """The rewritten model, compared with the model in float64. Caches that it writes are compared too."""
    module = rewrite(model, make(example), config=config)
    for seed in (example, *tries):
        mine, its = copied(make(seed)), doubled(make(seed))
        want = model(*its)
        assert relative_error(module(*mine), want) < TOLERANCES[torch.float32], seed
        for a, b in zip(mine, its, strict=True):
            assert not isinstance(a, Tensor) or relative_error(a, b) == 0 or torch.equal(a, b.float().to(a.dtype))
    return module


@pytest.mark.parametrize("name", GATHERS)
def test_a_gather_becomes_a_read_in_place(name: str) -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        *others, table, lengths = operands(seed=seed)
        return (*others, table.int() if name == "int32" else table, lengths)

    module = compare(Paged(GATHERS[name]), make)
    assert calls(module) == ["flash_blocks"] and not copies(module)
    (site,) = module.report.replaced
    assert site.kernel == "flash_blocks" and "cache-in-blocks" in {reason.code for reason in site.reasons}
    assert str(site.mask) == "key <= lengths[batch] - 1"


class Ordered(nn.Module):
    """Caches whose dims have another order: a permutation of blocks, heads, rows and features."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        found = []
        for cache in (keys, values):
            pages = cache.index_select(self.order.index("B"), table.flatten())
            pages = pages.permute([self.order.index(letter) for letter in "BSHD"])
            found.append(repeated(pages.reshape(BATCH, LENGTH, KV_HEADS, DIM).transpose(1, 2)))
        return scaled_dot_product_attention(query, *found, torch.arange(LENGTH) < lengths[:, None, None, None])


@pytest.mark.parametrize("order", ["BHSD", "BSHD", "HBSD", "SHBD"])
def test_caches_are_read_in_the_order_of_their_dims(order: str) -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        query, keys, values, *others = operands(seed=seed)
        caches = (c.permute(["BSHD".index(letter) for letter in order]).contiguous() for c in (keys, values))
        return (query, *caches, *others)

    module = compare(Ordered(order), make)
    assert calls(module) == ["flash_blocks"] and not copies(module)
    (call,) = module.graph.find_nodes(op="call_function", target=torch.ops.neuron_attn.flash_blocks.default)
    assert call.kwargs["cache_order"] == order


def test_keys_with_their_features_apart_are_copied() -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        query, *caches, table, lengths = operands(seed=seed)
        return (query, *(c.permute(0, 2, 3, 1).contiguous() for c in caches), table, lengths)

    module = compare(Ordered("BHDS"), make)
    assert calls(module) == ["flash_fwd"] and len(copies(module)) == 2
    assert "they are no rows" in module.report.sites[0].reasons[-1]


class Chunk(nn.Module):
    """Several new tokens behind a context: row i sees the keys up to its own."""

    def __init__(self, window: int | None = None, by_softmax: bool = False) -> None:
        super().__init__()
        self.window, self.by_softmax = window, by_softmax

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = (repeated(by_index(cache, table)) for cache in (keys, values))
        own = lengths[:, None, None, None] + torch.arange(query.shape[2])[:, None]
        j = torch.arange(key.shape[2])
        seen = j <= own
        if self.window is not None:
            seen = seen & (j > own - self.window)
        if self.by_softmax:
            scores = (query @ key.mT) * DIM**-0.5
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value
        return scaled_dot_product_attention(query, key, value, seen)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("by_softmax", [False, True])
def test_new_rows_are_causal(window: int | None, by_softmax: bool) -> None:
    module = compare(Chunk(window, by_softmax), lambda seed: operands(6, seed=seed))
    assert calls(module) == ["flash_blocks"] and not copies(module)


class Everything(nn.Module):
    """No mask: every key of the table is seen, whatever the lengths say."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, *(repeated(by_index(cache, table)) for cache in (keys, values)))


class OnePast(nn.Module):
    """The mask sees one key past the length."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = (repeated(by_index(cache, table)) for cache in (keys, values))
        return scaled_dot_product_attention(query, key, value, torch.arange(LENGTH) <= lengths[:, None, None, None])


@pytest.mark.parametrize("model", [Everything(), OnePast()], ids=["no mask", "one past"])
def test_what_the_mask_says_is_what_is_seen(model: nn.Module) -> None:
    module = compare(model, lambda seed: operands(seed=seed))
    assert calls(module) == ["flash_blocks"] and not copies(module)


class Slots(nn.Module):
    """A table with a number for each key, as blocks of one token."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        slots = (table[:, :, None] * SIZE + torch.arange(SIZE)).flatten(1)
        key, value = (repeated(cache.flatten(0, 1)[slots].transpose(1, 2)) for cache in (keys, values))
        return scaled_dot_product_attention(query, key, value, torch.arange(LENGTH) < lengths[:, None, None, None])


class OneTable(nn.Module):
    """All batch elements have the same blocks."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = (repeated(by_index(cache, table[:1])) for cache in (keys, values))
        return scaled_dot_product_attention(query, key, value, torch.arange(LENGTH) < lengths[:, None, None, None])


@pytest.mark.parametrize("model", [Slots(), OneTable()], ids=["slots", "one table"])
def test_tables_of_other_forms(model: nn.Module) -> None:
    module = compare(model, lambda seed: operands(seed=seed))
    assert calls(module) == ["flash_blocks"] and not copies(module)


def test_negative_numbers_count_from_the_end_as_in_an_index() -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        *others, table, lengths = operands(seed=seed)
        return (*others, table - BLOCKS * (table % 2), lengths)

    assert calls(compare(Paged(), make)) == ["flash_blocks"]


@pytest.mark.parametrize(("name", "number"), [("index", BLOCKS), ("index", -BLOCKS - 1), ("embedding", -1)])
def test_a_block_that_is_not_there(name: str, number: int) -> None:
    module = rewrite(Paged(GATHERS[name]), operands(), config=ALWAYS)
    *others, table, lengths = operands(seed=1)
    table[1, 2] = number
    with pytest.raises(InputError, match=rf"block_table must name blocks from -?\d+ to 23 .* one is {number}"):
        module(*others, table, lengths)


# With a write of the new tokens


def flat(cache: Tensor) -> Tensor:
    return cache.view(-1, *cache.shape[2:])


def put(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    flat(cache)[slots] = new


def copy(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    flat(cache).index_copy_(0, slots, new)


def scatter(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    flat(cache).scatter_(0, slots[:, None, None].expand_as(new), new)


WRITES = {"put": put, "copy": copy, "scatter": scatter}


class Step(nn.Module):
    """The new token of each request is written into its slot, and then seen."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], None] = put, late: bool = False) -> None:
        super().__init__()
        self.write, self.late = write, late

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        lengths: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
    ) -> Tensor:
        found = []
        for cache, new in ((keys, key), (values, value)):
            if not self.late:
                self.write(cache, slots, new)
            found.append(repeated(by_index(cache, table)))
            if self.late:
                self.write(cache, slots, new)
        seen = torch.arange(LENGTH) <= lengths[:, None, None, None]
        return scaled_dot_product_attention(query, *found, seen)


def step_operands(seed: int) -> tuple[Tensor, ...]:
    query, keys, values, table, lengths = operands(seed=seed)
    g = torch.Generator().manual_seed(100 + seed)
    key, value = (torch.randn(BATCH, KV_HEADS, DIM, generator=g) * 3 for _ in range(2))
    slots = table.gather(1, lengths[:, None] // SIZE)[:, 0] * SIZE + lengths % SIZE
    return query, keys, values, table, lengths, key, value, slots


@pytest.mark.parametrize("name", WRITES)
def test_a_write_before_the_read(name: str) -> None:
    module = compare(Step(WRITES[name]), step_operands)
    assert calls(module) == ["flash_blocks"] and not copies(module)


def test_a_block_that_is_not_there_is_found_before_anything_is_written() -> None:
    module = rewrite(Step(), step_operands(0), config=ALWAYS)
    inputs = step_operands(1)
    before = copied(inputs)
    inputs[3][2, 0] = BLOCKS + 7
    with pytest.raises(InputError, match="one is 31"):
        module(*inputs)
    assert torch.equal(inputs[1], before[1]) and torch.equal(inputs[2], before[2])


class Kept(nn.Module):
    """Caches in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self.register_buffer("keys", torch.zeros(BLOCKS, SIZE, KV_HEADS, DIM))
        self.register_buffer("values", torch.zeros(BLOCKS, SIZE, KV_HEADS, DIM))

    def forward(self, query: Tensor, table: Tensor, lengths: Tensor, *new: Tensor) -> Tensor:
        out: Tensor = self.step(query, self.keys, self.values, table, lengths, *new)
        return out


def test_buffers_are_written_and_read_step_by_step() -> None:
    def inputs(seed: int, step: int) -> tuple[Tensor, ...]:
        query, _, _, table, _, key, value, _ = step_operands(seed + step)
        table = operands(seed=7)[3]
        lengths = torch.full((BATCH,), step)
        return query, table, lengths, key, value, table[:, step // SIZE] * SIZE + step % SIZE

    module, model = rewrite(Kept(), inputs(0, 0), config=ALWAYS), Kept().double()
    assert calls(module) == ["flash_blocks"] and not copies(module)
    for step in range(2 * SIZE + 1):
        call = inputs(20, step)
        assert relative_error(module(*call), model(*doubled(call))) < TOLERANCES[torch.float32], step
    assert relative_error(module.keys, model.keys) < TOLERANCES[torch.float32]


def test_a_write_without_effects_gives_a_new_cache() -> None:
    class Functional(nn.Module):
        def forward(self, query: Tensor, *rest: Tensor) -> Any:
            keys, values, table, lengths, key, value, slots = rest
            keys, values = (
                flat(cache).index_put((slots,), part).view_as(cache) for cache, part in ((keys, key), (values, value))
            )
            found = [repeated(by_index(cache, table)) for cache in (keys, values)]
            seen = torch.arange(LENGTH) <= lengths[:, None, None, None]
            return scaled_dot_product_attention(query, *found, seen)

    module = compare(Functional(), step_operands)
    assert calls(module) == ["flash_blocks"] and not copies(module)


# Copies that stay


def test_a_write_after_the_read_keeps_the_copy() -> None:
    module = compare(Step(late=True), step_operands)
    assert calls(module) == ["flash_fwd"] and len(copies(module)) == 2
    (site,) = module.report.replaced
    assert site.reasons[-1].code == "cache-copied" and "is written after" in site.reasons[-1]


class Near(nn.Module):
    """What is almost a cache in blocks."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, query: Tensor, *rest: Tensor) -> Tensor:
        keys, values, table, lengths, more = rest
        seen = torch.arange(LENGTH) < lengths[:, None, None, None]
        key, value = by_index(keys, table), by_index(values, table)
        if self.fault == "another table":
            value = by_index(values, more)
        if self.fault == "another order of blocks":
            value = by_index(values, table.flip(1))
        if self.fault == "another block size":
            value = by_index(values.view(-1, SIZE // 2, KV_HEADS, DIM), more)
        if self.fault == "rows of blocks turned":
            value = by_index(values.flip(1), table)
        if self.fault == "a table for each head":
            key, value = (
                torch.stack([by_index(cache[:, :, h : h + 1], t)[:, 0] for h, t in enumerate((table, more))], 1)
                for cache in (keys, values)
            )
        if self.fault == "padding":
            seen = seen & more[:, None, None].bool()
        if self.fault == "a bias":
            return scaled_dot_product_attention(query, repeated(key), repeated(value), more[:, None, None])
        if self.fault == "keys that are changed":
            key = key * 1.5 + more.sum()
        if self.fault == "keys that are dropped":
            key, value = key[:, :, :-3], value[:, :, :-3]
            seen = seen[..., :-3]
        return scaled_dot_product_attention(query, repeated(key), repeated(value), seen)


def near_operands(fault: str) -> Callable[[int], tuple[Tensor, ...]]:
    def make(seed: int) -> tuple[Tensor, ...]:
        given, g = operands(seed=seed), torch.Generator().manual_seed(50 + seed)
        if fault == "another block size":
            more = torch.randint(0, 2 * BLOCKS, (BATCH, 2 * COUNT), generator=g)
        elif fault == "padding":
            more = torch.randint(0, 2, (BATCH, LENGTH), generator=g)
            more[:, 0] = 1
        elif fault in ("a bias", "keys that are changed"):
            more = torch.randn(BATCH, LENGTH, generator=g)
        else:
            more = torch.randint(0, BLOCKS, (BATCH, COUNT), generator=g)
        return (*given, more)

    return make


@pytest.mark.parametrize(
    "fault",
    [
        "another table",
        "another order of blocks",
        "another block size",
        "a table for each head",
        "padding",
        "a bias",
        "keys that are changed",
        "keys that are dropped",
    ],
)
def test_near_misses_keep_the_copy(fault: str) -> None:
    module = compare(Near(fault), near_operands(fault))
    assert "flash_blocks" not in calls(module) and copies(module)
    (site,) = module.report.sites
    codes = {reason.code for reason in site.reasons}
    assert ("cache-copied" in codes) == (fault in ("padding", "a bias")), site.reasons


def test_a_cache_that_the_model_turns_is_read_as_it_turns_it() -> None:
    module = compare(Near("rows of blocks turned"), near_operands("rows of blocks turned"))
    assert calls(module) == ["flash_blocks"] and not copies(module)


@pytest.mark.parametrize(
    "config",
    [
        RewriteConfig(policy="always", kernels=("attention_cte",), tolerances={torch.float32: 0.016}),
        RewriteConfig(policy="always", target="trn1"),
    ],
    ids=["kernels", "trn1"],
)
def test_kernels_that_read_no_blocks(config: RewriteConfig) -> None:
    module = rewrite(Paged(), operands(), config=config)
    (site,) = module.report.sites
    assert "flash_blocks" not in calls(module) and len(copies(module)) == 2
    assert site.reasons[-1].code == "cache-copied"


def test_a_policy_that_wants_no_kernel_keeps_the_model() -> None:
    module = rewrite(Paged(), operands(), config=RewriteConfig(policy="sdk"))
    assert not calls(module) and len(copies(module)) == 2


def test_a_copy_with_another_reader_stays_for_that_one() -> None:
    class Twice(nn.Module):
        def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Any:
            pages = keys[table]
            key = repeated(pages.flatten(1, 2).transpose(1, 2))
            value = repeated(by_index(values, table))
            seen = torch.arange(LENGTH) < lengths[:, None, None, None]
            return scaled_dot_product_attention(query, key, value, seen), pages.sum()

    module = rewrite(Twice(), operands(), config=ALWAYS)
    assert calls(module) == ["flash_blocks"] and len(copies(module)) == 1
    call = operands(seed=4)
    for new, old in zip(module(*call), Twice()(*doubled(call)), strict=True):
        assert relative_error(new, old) < TOLERANCES[torch.float32]


def test_open_sizes() -> None:
    blocks, batch = torch.export.Dim("blocks", min=4, max=512), torch.export.Dim("batch", min=2, max=64)
    cache = {0: blocks}
    module = rewrite(
        Paged(), operands(), config=ALWAYS, dynamic_shapes=({0: batch}, cache, cache, {0: batch}, {0: batch})
    )
    assert calls(module) == ["flash_blocks"] and not copies(module)
    g = torch.Generator().manual_seed(0)
    query = torch.randn(7, HEADS, 1, DIM, generator=g) * 3
    keys, values = (torch.randn(60, SIZE, KV_HEADS, DIM, generator=g) * 3 for _ in range(2))
    table, lengths = torch.randint(0, 60, (7, COUNT), generator=g), torch.randint(1, LENGTH, (7,), generator=g)
    call = query, keys, values, table, lengths
    assert relative_error(module(*call), Paged()(*doubled(call))) < TOLERANCES[torch.float32]


def test_gradients_are_those_of_the_model() -> None:
    module = rewrite(Paged(), operands(), config=ALWAYS)
    call = [t.requires_grad_() if t.is_floating_point() else t for t in operands(seed=2)]
    same = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in call]
    module(*call).square().sum().backward()
    Paged()(*same).square().sum().backward()
    for mine, its in zip(call[:3], same[:3], strict=True):
        assert relative_error(mine.grad, its.grad) < TOLERANCES[torch.float32]


def test_16_bits() -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        return tuple(t.bfloat16() if t.is_floating_point() else t for t in operands(seed=seed))

    module = rewrite(Paged(), make(0), config=ALWAYS)
    assert calls(module) == ["flash_blocks"]
    for seed in (1, 2):
        assert relative_error(module(*make(seed)), Paged()(*doubled(make(seed)))) < TOLERANCES[torch.bfloat16]
    wide = rewrite(Paged(lambda c, t: by_index(c, t).float()), (operands()[0], *make(0)[1:]), config=ALWAYS)
    assert "flash_blocks" not in calls(wide)


def test_it_can_be_saved(tmp_path: Any) -> None:
    module = rewrite(Step(), step_operands(0), config=ALWAYS)
    module.save(tmp_path / "model.safetensors")
    loaded = RewrittenModule.load(tmp_path / "model.safetensors")
    assert calls(loaded) == ["flash_blocks"]
    call = step_operands(3)
    assert torch.equal(loaded(*copied(call)), module(*copied(call)))


if find_spec("torch_xla"):

    def test_a_lowered_module_calls_one_kernel() -> None:
        module = rewrite_for_trace(Paged(), operands(), RewriteConfig(policy="always", require="all"))
        assert calls(module) == ["flash_blocks"]
        assert not verify_trace(module, operands(seed=1)).problems
