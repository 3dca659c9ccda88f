"""`flash_blocks`: on the CPU, as every other device computes it, and through the NKI kernel of `flash_paged`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.errors import InputError
from neuron_attn_rewrite.ops.blocks import CACHE_ORDERS, FlashBlocks
from neuron_attn_rewrite.ops.definitions import BLOCKS
from tests.ops.test_cached import normal, on_simulator, token_by_token
from tests.ops.test_flash_fwd import relative_error

flash_blocks = torch.ops.neuron_attn.flash_blocks.default
checked_blocks = torch.ops.neuron_attn.checked_blocks.default
IMPLEMENTATIONS = {
    "cpu": flash_blocks,
    "decomposed": lambda *tensors, **options: FlashBlocks(*tensors, **options).decomposed(),
    "gen3": on_simulator(flash_blocks, "gen3"),
    "gen4": on_simulator(flash_blocks, "gen4"),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Sizes:
    batch: int = 3
    heads: int = 4
    kv_heads: int = 2
    q_len: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    block_size: int = 8
    count: int = 5
    """Blocks of a batch element."""
    shared: bool = False
    """Whether all batch elements have the same table."""
    order: str = "BHSD"
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        return 3 * self.count

    def operands(self) -> tuple[Tensor, ...]:
        plain = [
            normal(self.blocks, self.kv_heads, self.block_size, dim, dtype=self.dtype)
            for dim in (self.head_dim, self.v_head_dim)
        ]
        caches = [cache.permute(["BHSD".index(letter) for letter in self.order]).contiguous() for cache in plain]
        query = normal(self.batch, self.heads, self.q_len, self.head_dim, dtype=self.dtype)
        return query, *caches, torch.randint(0, self.blocks, (1 if self.shared else self.batch, self.count))

    def bounds(self) -> Tensor:
        """Row i of an element sees up to 20 keys before its own; one element sees none."""
        kv_len = self.count * self.block_size
        end = torch.randint(1, kv_len - self.q_len + 1, (self.batch, 1)) + torch.arange(self.q_len)
        end[-1] = 0
        return torch.stack([(end - 20).clamp_min(0), end], -1)


def expected(sizes: Sizes, query: Tensor, *rest: Tensor, seen: Tensor, **options: Any) -> Tensor:
    """Row by row in float64. seen: bool [batch, q_len, keys]."""
    *caches, table = rest
    caches = [cache.permute([sizes.order.index(letter) for letter in "BHSD"]) for cache in caches]
    out = torch.zeros(*query.shape[:3], sizes.v_head_dim, dtype=torch.float64)
    sink = options.pop("sink", None)
    for b in range(sizes.batch):
        numbers = table[0 if sizes.shared else b].clamp_min(0).tolist()
        for h in range(sizes.heads):
            g = h // (sizes.heads // sizes.kv_heads)
            keys, values = (torch.cat([cache[number, g] for number in numbers]) for cache in caches)
            share = None if sink is None else sink[h]
            out[b, h] = token_by_token(query[b, h], keys, values, seen[b], sink=share, **options)
    return out


CASES = {
    "decode": Sizes(q_len=1),
    "a row for each head": Sizes(heads=3, kv_heads=3, v_head_dim=24, order="BSHD"),
    "blocks of one token": Sizes(batch=2, block_size=1, count=300, order="HBSD"),
    "many rows": Sizes(batch=2, q_len=100, block_size=48, order="SHBD"),
    "one table": Sizes(batch=5, q_len=30, shared=True, order="SBHD"),
    "tiles": Sizes(batch=2, block_size=128, count=9, head_dim=136, v_head_dim=160, heads=2, kv_heads=1, order="HSBD"),
    "16 bits": Sizes(dtype=torch.bfloat16, order="BSHD"),
}


@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, lnc: int) -> None:
    sizes = CASES[name]
    tensors, bounds = sizes.operands(), sizes.bounds()
    kv_len = sizes.count * sizes.block_size
    j = torch.arange(kv_len)
    seen = (bounds[..., :1] <= j) & (j < bounds[..., 1:])
    terms: dict[str, Any] = {"scale": 0.2, "softcap": None, "sink": None}
    if lnc == 2:
        terms |= {"softcap": 5.0, "sink": torch.randn(sizes.heads) * 3}
    want = expected(sizes, *tensors, seen=seen, **terms)
    for which, implementation in IMPLEMENTATIONS.items():
        out = implementation(*tensors, **terms, bounds=bounds, lnc=lnc, cache_order=sizes.order)
        assert out.dtype == sizes.dtype and relative_error(out, want) <= TOLERANCES[sizes.dtype], which
        assert not out[-1].any()


@pytest.mark.parametrize(("lower", "upper"), [(None, None), (None, 7), (-3, 20), (5, None)])
def test_bands(lower: int | None, upper: int | None) -> None:
    sizes = Sizes(q_len=4)
    tensors = sizes.operands()
    i, j = torch.arange(4)[:, None], torch.arange(40)
    seen = (j >= (0 if lower is None else i + lower)) & (j <= (40 if upper is None else i + upper))
    want = expected(sizes, *tensors, seen=seen.expand(3, 4, 40), scale=0.2, softcap=None)
    for which, implementation in IMPLEMENTATIONS.items():
        out = implementation(*tensors, scale=0.2, band_lower=lower, band_upper=upper)
        assert relative_error(out, want) <= TOLERANCES[torch.float32], which


def test_absent_blocks_and_what_lies_behind_the_keys() -> None:
    """-1 where no row sees a key, and NaN in every row of the cache that is not seen."""
    sizes = Sizes(q_len=1, batch=2)
    query, keys, values, table = sizes.operands()
    table, bounds = torch.tensor([[3, 4, -1, -1, -1], [-1, 5, 6, 7, -1]]), torch.tensor([[[0, 11]], [[9, 30]]])
    j = torch.arange(40)
    seen = (bounds[..., :1] <= j) & (j < bounds[..., 1:])
    want = expected(sizes, query, keys, values, table, seen=seen, scale=0.2, softcap=None)
    unused = torch.ones(sizes.blocks, 8, dtype=torch.bool)
    for b in range(2):
        for at in seen[b, 0].nonzero()[:, 0].tolist():
            unused[table[b, at // 8], at % 8] = False
    for cache in (keys, values):
        cache.transpose(1, 2)[unused] = torch.nan
    out = flash_blocks(query, keys, values, table, scale=0.2, bounds=bounds)
    assert relative_error(out, want) <= TOLERANCES[torch.float32]


def test_launches_are_made_without_a_look_at_any_value() -> None:
    sizes = Sizes(order="BSHD")
    tensors = [t.to("meta") for t in sizes.operands()]
    launch = FlashBlocks(*tensors, scale=0.3, bounds=sizes.bounds().to("meta"), cache_order="BSHD").launch()
    assert all(t.is_meta and t.is_contiguous() for t in launch.tensors.values())


@pytest.mark.parametrize("order", CACHE_ORDERS)
def test_no_order_of_the_cache_is_copied(order: str) -> None:
    sizes = Sizes(order=order)
    query, keys, values, table = sizes.operands()
    made = FlashBlocks(query, keys, values, table, scale=0.3, cache_order=order).launch().tensors
    assert made["k_cache"].data_ptr() == keys.data_ptr() and made["v_cache"].data_ptr() == values.data_ptr()


def test_keys_are_loaded_once_for_all_rows() -> None:
    sizes = Sizes(batch=4, q_len=70, block_size=64, count=8)
    launch = FlashBlocks(*sizes.operands(), scale=0.3).launch()
    rows = launch.tensors["kv_rows"]
    assert int((rows < sizes.blocks * sizes.kv_heads * sizes.block_size).sum()) == 4 * 8 * 64 * sizes.kv_heads


def test_gradients_are_those_of_a_copy() -> None:
    sizes = Sizes()
    query, keys, values, table = sizes.operands()
    sink, bounds = torch.randn(4), sizes.bounds()
    given = [t.requires_grad_() for t in (query, keys, values, sink)]
    same = [t.detach().double().requires_grad_() for t in given]
    flash_blocks(*given[:3], table, scale=0.3, bounds=bounds, sink=given[3]).square().sum().backward()
    FlashBlocks(*same[:3], table, scale=0.3, bounds=bounds, sink=same[3]).decomposed().square().sum().backward()
    for mine, its in zip(given, same, strict=True):
        assert relative_error(mine.grad, its.grad) <= TOLERANCES[torch.float32]


def test_torch_agrees_that_these_are_ops() -> None:
    sizes = Sizes(order="BSHD")
    options = {"scale": 0.3, "cache_order": "BSHD", "bounds": sizes.bounds()}
    torch.library.opcheck(flash_blocks, sizes.operands(), options)
    torch.library.opcheck(checked_blocks, (torch.tensor([[1, -2]]), 4), {"wraps": True})


def test_numbers_are_checked_and_counted_from_the_end() -> None:
    table = torch.tensor([[0, -1], [-4, 3]])
    found = checked_blocks(table, 4, True)
    assert found.dtype == torch.int32 and found.tolist() == [[0, 3], [0, 3]]
    assert checked_blocks(table.abs() % 4, 4).tolist() == [[0, 1], [0, 3]]
    for wrong, wraps, least in ((table, False, 0), (table - 1, True, -4), (table + 1, True, -4)):
        with pytest.raises(InputError, match=f"block_table must name blocks from {least} to 3"):
            checked_blocks(wrong, 4, wraps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_order": "BHDS"}, "cache_order must be one of BHSD"),
        ({"block_table": torch.zeros(2, 5, dtype=torch.int64)}, r"block_table must be int \[1 \| 3, blocks"),
        ({"block_table": torch.zeros(3, 5)}, "block_table must be int"),
        ({"block_table": torch.full((3, 5), 15)}, "block_table must name blocks from -1 to 14"),
        ({"block_table": torch.full((3, 5), -1)}, "a row sees a key of block_table's -1"),
        ({"key_cache": torch.zeros(15, 2, 8)}, "key_cache must have the dims"),
        ({"value_cache": torch.zeros(14, 2, 8, 16)}, "value_cache must have key_cache's blocks"),
        ({"value_cache": torch.zeros(15, 2, 8, 16, dtype=torch.float16)}, "value must have query's dtype"),
        ({"query": torch.zeros(3, 4, 16)}, r"query must be \[batch, num_heads"),
        ({"key_cache": torch.zeros(15, 3, 8, 16), "value_cache": torch.zeros(15, 3, 8, 16)}, "number of heads"),
        ({"bounds": torch.zeros(3, 5, 2, dtype=torch.int64)}, r"bounds must be \[3 \| 1, 2, 2\]"),
        ({"block_table": None}, "block_table must be a tensor"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    names = ("query", "key_cache", "value_cache", "block_table")
    call = {**dict(zip(names, Sizes().operands(), strict=True)), "scale": 0.3, **change}
    with pytest.raises(InputError, match=message):
        on_cpu(**call)


def on_cpu(**call: Any) -> Tensor:
    """What the op does on the CPU. Its schema would refuse what is no tensor."""
    tensors = [call.pop(name) for name in ("query", "key_cache", "value_cache", "block_table")]
    return BLOCKS.on_cpu(*tensors, **call)
