"""Sizes that are symbols: what is claimed holds for all their values, and the result takes all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.export import Dim

from neuron_attn_rewrite import CaptureError, InputError, RewrittenModule, collect_reports, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, kernel_calls, relative_error
from tests.models import FAMILIES, VOCABULARY

LOW = torch.finfo(torch.float32).min
SIZES = {0: Dim("batch", max=64), 1: Dim("length", max=64)}


def paddings(batch: int, length: int) -> list[Tensor]:
    """Every way to pad that shows: none, left, right, holes."""
    ones = torch.ones(batch, length, dtype=torch.int64)
    left, holes = ones.clone(), torch.randint(0, 2, (batch, length))
    left[0, : length // 2] = 0
    holes[:, 0] = 1
    return [ones, left, left.flip(1), holes]


def assert_same_tokens(model: torch.nn.Module, rewritten: torch.nn.Module) -> None:
    for batch, length in ((1, 3), (3, 31), (2, 64)):
        for mask in paddings(batch, length):
            call = {"input_ids": torch.randint(3, VOCABULARY, (batch, length)), "attention_mask": mask}
            with torch.no_grad():
                old, new = model(**call)[0], rewritten(**call)[0]
            real = mask.bool()
            assert relative_error(new[real], old[real]) <= TOLERANCES[torch.float32], (batch, length)


TRANSFORMERS_4_CANNOT_TRACE = ("gpt2", "eager")
"""transformers 4 cuts this model's table of masks to a length that is a number then."""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_models_of_any_batch_and_length(name: str, implementation: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model, call = family.build(implementation), family.call("ones")
    shapes = {"input_ids": SIZES, "attention_mask": SIZES}
    try:
        rewritten = rewrite(model, (), call, config=ALWAYS, dynamic_shapes=shapes)
    except CaptureError:
        assert transformers.__version__.startswith("4.")
        assert (name, implementation) == TRANSFORMERS_4_CANNOT_TRACE
        return
    assert len(rewritten.report.replaced) == len(rewritten.report.sites) == len(kernel_calls(rewritten)) == 2
    causal = "" if name == "bert" else "causal(offset=0) & "
    assert {str(site.mask) for site in rewritten.report.sites} == {f"{causal}key_padding(attention_mask)"}
    assert "holds for every batch" in " ".join(rewritten.report.sites[0].reasons)
    assert_same_tokens(model, rewritten)
    again = torch.export.export(rewritten, (), call, dynamic_shapes=shapes, strict=False)
    assert_same_tokens(model, again.module())


@pytest.mark.parametrize(("name", "second"), [("mistral", "sliding_window(16)"), ("gemma2", "causal(offset=0)")])
def test_packed_sequences_of_any_batch_and_length(name: str, second: str) -> None:
    """Masks that are more than padding and one window for all layers."""
    torch.manual_seed(0)
    model = next(f for f in FAMILIES if f.name == name).build("eager")
    example = {"input_ids": torch.randint(3, VOCABULARY, (3, 24)), "position_ids": torch.arange(24).repeat(3, 1)}
    rewritten = rewrite(model, (), example, config=ALWAYS, dynamic_shapes=dict.fromkeys(example, SIZES))
    masks = [re.sub(r"cumsum_\d+", "cumsum", str(site.mask)) for site in rewritten.report.sites]
    part = "key >= first(cumsum >= cumsum[batch, query])"
    assert masks == [f"sliding_window(16) & {part}", f"{second} & {part}"]
    for sizes in ((1, 9), (5, 31), (2, 64)):
        positions = (torch.arange(sizes[1]) >= sizes[1] // 3).cumsum(0).repeat(sizes[0], 1)
        call = {"input_ids": torch.randint(3, VOCABULARY, sizes), "position_ids": positions}
        with torch.no_grad():
            assert relative_error(rewritten(**call)[0], model(**call)[0]) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("as_module", [False, True])
def test_what_is_captured_keeps_its_symbols(as_module: bool) -> None:
    family = next(f for f in FAMILIES if f.name == "bert")
    model, call = family.build("sdpa"), family.call("ones")
    shapes = {"input_ids": SIZES, "attention_mask": SIZES}
    program = torch.export.export(model, (), call, dynamic_shapes=shapes, strict=False)
    captured = program.module() if as_module else program
    rewritten = rewrite(captured, (), call, config=ALWAYS)
    assert len(rewritten.report.replaced) == 2
    assert_same_tokens(model, rewritten)
    with pytest.raises(InputError, match="not captured yet"):
        rewrite(captured, (), call, config=ALWAYS, dynamic_shapes=shapes)


class Past(torch.nn.Module):
    """The mask comes first: its keys are those of the cache and the new ones."""

    def forward(self, mask: Tensor, q: Tensor, new: Tensor, past: Tensor) -> Tensor:
        key = torch.cat([past, new], 2)
        return F.scaled_dot_product_attention(q, key, key, attn_mask=mask[:, None, None].bool())


@pytest.mark.parametrize("ranges", [(Dim.AUTO, Dim.AUTO), (Dim("new", max=64), Dim("past", max=64))], ids=str)
def test_a_size_that_is_the_sum_of_those_of_later_arguments(ranges: tuple[Any, Any]) -> None:
    def call(batch: int, new: int, past: int) -> tuple[Tensor, ...]:
        mask = torch.ones(batch, new + past, dtype=torch.int64)
        mask[0, : past // 2] = 0
        return mask, *(3 * torch.randn(batch, 2, length, 8) for length in (new, new, past))

    model, batch, (new, past) = Past(), Dim("batch", max=8), ranges
    shapes = ({0: batch, 1: Dim.AUTO}, {0: batch, 2: new}, {0: batch, 2: new}, {0: batch, 2: past})
    rewritten = rewrite(model, call(3, 12, 20), config=ALWAYS, dynamic_shapes=shapes)
    assert str(rewritten.report.sites[0].mask) == "key_padding(mask)"
    for sizes in ((2, 5, 9), (1, 1, 30), (4, 30, 1)):
        inputs = call(*sizes)
        assert relative_error(rewritten(*inputs), model(*inputs)) <= TOLERANCES[torch.float32], sizes
    mask, *others = call(2, 5, 9)
    with pytest.raises(InputError, match=r"'mask' .* a size does not fit: 13 is not 14\."):
        rewritten(mask[:, :13], *others)


# Small programs: query [batch, 2, q_len, 8], key [batch, 2, kv_len, 8] and a mask [batch, kv_len]


class Masked(torch.nn.Module):
    """Attention under a mask that `build` makes of the padding, the rows [q_len, 1] and the keys [1, kv_len]."""

    def __init__(self, build: Callable[..., Tensor]) -> None:
        super().__init__()
        self.build = build

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        mask = self.build(attention_mask, torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def inputs(batch: int, q_len: int, kv_len: int, mask: Tensor | None = None) -> tuple[Tensor, ...]:
    q, k, v = (3 * torch.randn(batch, 2, length, 8) for length in (q_len, kv_len, kv_len))
    return q, k, v, torch.ones(batch, kv_len, dtype=torch.int64) if mask is None else mask


PROGRAMS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda m, i, j: (i >= 0) & (j >= 0), "none"),
    "causal": (lambda m, i, j: j <= i, "causal(offset=0)"),
    "triangle": (lambda m, i, j: torch.ones(i.shape[0], j.shape[1]).tril().bool(), "causal(offset=0)"),
    "bottom right": (lambda m, i, j: j <= i + (j.shape[1] - i.shape[0]), "key <= k_len - q_len + query"),
    "window": (lambda m, i, j: (j <= i) & (j > i - 4), "sliding_window(4)"),
    "both ways": (lambda m, i, j: (j - i).abs() <= 3, "window(left=3, right=3)"),
    "prefix": (lambda m, i, j: j < 5, "key <= 4"),
    "padding": (lambda m, i, j: m[:, None, None].bool(), "key_padding(attention_mask)"),
    "causal and padding": (
        lambda m, i, j: (j <= i) & m[:, None, None].bool(),
        "causal(offset=0) & key_padding(attention_mask)",
    ),
    "added": (lambda m, i, j: (1.0 - m[:, None, None].float()) * LOW, "key_padding(attention_mask)"),
    "chosen and added": (
        lambda m, i, j: torch.where((j <= i) & m[:, None, None].bool(), 0.0, LOW),
        "causal(offset=0) & key_padding(attention_mask)",
    ),
    "chunks": (lambda m, i, j: j // 4 == i // 4, "key >= 4 * (query // 4) & key <= 4 * (query // 4) + 3"),
    "chunks and causal": (
        lambda m, i, j: (j // 4 == i // 4) & (j <= i),
        "causal(offset=0) & key >= 4 * (query // 4)",
    ),
    # What is not an interval, or only at the length of the example, is a dense operand.
    "remainders": (lambda m, i, j: j % 4 == i % 4, "none"),
    "causal up to the example's length": (lambda m, i, j: (j <= i) | (i >= 12), "none"),
    "everything but a key behind the example": (lambda m, i, j: j != 12, "none"),
    "either": (lambda m, i, j: (j <= i) | m[:, None, None].bool(), "none"),
    "reversed": (lambda m, i, j: m.flip(1)[:, None, None].bool(), "none"),
    "half": (lambda m, i, j: j < j.shape[1] // 2, "key <= (k_len//2) - 1"),
    "summed": (lambda m, i, j: j < m.sum(1)[:, None, None, None], "key_padding(lt)"),
}


def open_sizes(batch: Any, q_len: Any, kv_len: Any) -> dict[str, Any]:
    keys = {0: batch, 2: kv_len}
    return {"q": {0: batch, 2: q_len}, "k": keys, "v": keys, "attention_mask": {0: batch, 1: kv_len}}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_mask_means_the_same_at_every_size(name: str) -> None:
    build, expected = PROGRAMS[name]
    model = Masked(build)
    shapes = open_sizes(Dim("batch", max=64), Dim("q_len", max=64), Dim("kv_len", max=64))
    rewritten = rewrite(model, inputs(2, 11, 12), config=ALWAYS, dynamic_shapes=shapes)
    assert len(kernel_calls(rewritten)) == 1, str(rewritten.report)
    found = str(rewritten.report.sites[0].mask)
    for node in rewritten.graph.find_nodes(op="placeholder"):
        if node.name in "qk":
            found = found.replace(str(node.meta["val"].shape[2]), f"{node.name}_len")
    assert set(found.split(" & ")) == set(expected.split(" & "))
    for size in ((1, 5, 5), (3, 30, 30), (2, 3, 20), (2, 20, 3)):
        for mask in paddings(size[0], size[2]):
            call = inputs(*size, mask)
            with torch.no_grad():
                assert relative_error(rewritten(*call), model(*call)) <= TOLERANCES[torch.float32], size


LENGTHS = {"q": {2: Dim("length", max=64)}, "k": {2: Dim("length", max=64)}, "v": {2: Dim("length", max=64)}}


class Scaled(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * (q.shape[2] / 64), -1) @ v


class Queries(torch.nn.Module):
    """A mask of whole rows, which is laid out by two sizes of the inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=shown[:, None, :, None])


@pytest.mark.parametrize(("model", "replaced"), [(Scaled(), 0), (Queries(), 1)])
def test_sizes_as_numbers(model: torch.nn.Module, replaced: int) -> None:
    """A scale made of a size is none that is known; sizes are there before what is laid out by them."""
    shapes: dict[str, Any] = {**LENGTHS, **({"shown": {1: Dim("length", max=64)}} if replaced else {})}

    def call(length: int) -> tuple[Tensor, ...]:
        return (*inputs(2, length, length)[:3], *([torch.rand(2, length) < 0.7] if replaced else []))

    rewritten = rewrite(model, call(12), config=ALWAYS, dynamic_shapes=shapes)
    assert len(kernel_calls(rewritten)) == replaced, str(rewritten.report)
    for length in (2, 20):
        given = call(length)
        assert relative_error(rewritten(*given), model(*given)) <= TOLERANCES[torch.float32]


def rewritten_padding() -> RewrittenModule:
    length = Dim("length", max=32)
    shapes = open_sizes(Dim("batch", max=8), length, length)
    return rewrite(Masked(PROGRAMS["padding"][0]), inputs(2, 12, 12), config=ALWAYS, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("size", "mask"),
    [
        ((9, 12, 12), None),
        ((2, 33, 33), None),
        ((2, 12, 11), None),
        ((2, 12, 12), torch.ones(2, 11, dtype=torch.int64)),
    ],
)
def test_sizes_that_the_symbols_do_not_allow(size: tuple[int, int, int], mask: Tensor | None) -> None:
    with pytest.raises(InputError, match=r"was captured as .*: "):
        rewritten_padding()(*inputs(*size, mask))


def test_a_number_stays_a_number() -> None:
    q, k, v, mask = inputs(2, 12, 12)
    with pytest.raises(InputError, match="was captured as"):
        rewritten_padding()(q[:, :1], k, v, mask)


class KeysFromData(torch.nn.Module):
    """Reads only the keys that an input names: how many is not known before it runs."""

    def forward(self, q: Tensor, keep: Tensor) -> Tensor:
        k = q[:, :, keep.nonzero().squeeze(1)]
        return torch.softmax(q @ k.mT / 4, -1) @ k


def test_a_size_from_data_stays_native() -> None:
    q, keep = torch.randn(2, 4, 16, 8), torch.arange(16) % 3 > 0
    rewritten = rewrite(KeysFromData(), (q, keep), config=ALWAYS)
    (site,) = rewritten.report.kept
    assert site.reasons[-1].code == "data-sizes"  # type: ignore[attr-defined]
    fewer = torch.arange(16) % 5 > 2
    assert torch.equal(rewritten(q, fewer), KeysFromData()(q, fewer))


class Beside(torch.nn.Module):
    """Heads beside each other in a row: operands and result are transposed, the operands behind a split or not."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, length = query.shape[:2]
        if self.split:
            query, key, value = (t.view(batch, length, 2, 8) for t in (query, key, value))
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)
        return out.transpose(1, 2).reshape(batch, length, 16)


@pytest.mark.parametrize(("split", "orders"), [(False, "BSHD,BSHD,BSHD,BSHD"), (True, "BHSD,BHSD,BHSD,BSHD")])
@pytest.mark.parametrize("compiled", [False, True])
def test_transposes_vanish_at_every_size(split: bool, orders: str, compiled: bool) -> None:
    """But where ours would have to name a size that the model's own view names."""

    def operands(batch: int, length: int) -> tuple[Tensor, ...]:
        sizes = (batch, length, 16) if split else (batch, length, 2, 8)
        return tuple(3 * torch.randn(sizes) for _ in range(3))

    model = Beside(split)
    if compiled:
        options = {"policy": "always", "inner": "eager"}
        with collect_reports() as collected:
            changed: Any = torch.compile(model, backend="neuron_attn_rewrite", options=options)
            first = operands(2, 12)
            for tensor in first:
                for dim in (0, 1):
                    torch._dynamo.mark_dynamic(tensor, dim)
            changed(*first)
        report = collected.report
    else:
        sizes = {0: Dim("batch", max=64), 1: Dim("length", max=64)}
        shapes = dict.fromkeys(("query", "key", "value"), sizes)
        changed = rewrite(model, operands(2, 12), config=ALWAYS, dynamic_shapes=shapes)
        report = changed.report
        torch.export.export(changed, operands(2, 12), dynamic_shapes=shapes, strict=False)
    (site,) = report.sites
    assert (site.transposes_saved, any(orders in node.call for node in site.after)) == (1 if split else 4, True)
    for batch, length in ((1, 5), (3, 40)):
        call = operands(batch, length)
        assert relative_error(changed(*call), model(*call)) <= TOLERANCES[torch.float32]
    torch._dynamo.reset()


def test_a_head_dim_that_is_a_symbol_gives_no_scale() -> None:
    """torch.compile(dynamic=True) makes a symbol of every size; where the scale is written it is a number."""
    with collect_reports() as collected:
        compiled = torch.compile(Beside(False), backend="neuron_attn_rewrite", dynamic=True, options={"inner": "eager"})
        compiled(*(torch.randn(2, 12, 2, 8) for _ in range(3)))
    (site,) = collected.report.sites
    assert site.reasons[-1].code == "scale-unknown" and not site.is_replaced
    torch._dynamo.reset()


class Cached(torch.nn.Module):
    """A row of new tokens against a cache and itself."""

    def forward(self, new: Tensor, mask: Tensor, cache: Tensor) -> Tensor:
        keys = torch.cat([cache, new], 2)
        return F.scaled_dot_product_attention(new, keys, keys, mask[:, None, None].bool())


class Growing(torch.nn.Module):
    """New tokens against two caches and themselves: no input has the number of keys, nor that of heads and queries."""

    def forward(self, new: Tensor, cache: Tensor, older: Tensor) -> Tensor:
        keys = torch.cat([older, cache, new], 2)
        heads = torch.cat([new, new.flip(2)], 1)
        seen = torch.arange(keys.shape[2]) < torch.arange(new.shape[2])[:, None] + keys.shape[2] - new.shape[2] + 1
        return F.scaled_dot_product_attention(heads, keys, keys, seen, enable_gqa=True)


def test_sums_of_the_sizes_of_several_inputs() -> None:
    def inputs(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, 2, size, 8) * 3 for size in sizes)

    shapes = tuple({2: Dim(name, min=2, max=64)} for name in ("queries", "past", "older"))
    rewritten = rewrite(Growing(), inputs(3, 9, 11), config=ALWAYS, dynamic_shapes=shapes)
    assert len(kernel_calls(rewritten)) == 1, str(rewritten.report)
    for sizes in ((3, 9, 11), (2, 2, 2), (7, 30, 3), (40, 5, 64)):
        call = inputs(*sizes)
        assert relative_error(rewritten(*call), Growing()(*call)) <= TOLERANCES[torch.float32]


def test_a_size_that_is_another_one_and_a_number() -> None:
    """`past + 1` of the mask comes before `past` of the cache."""

    def inputs(past: int) -> tuple[Tensor, ...]:
        return torch.randn(2, 2, 1, 8), torch.ones(2, past + 1, dtype=torch.int64), torch.randn(2, 2, past, 8)

    past = Dim("past", min=2, max=64)
    rewritten = rewrite(Cached(), inputs(12), config=ALWAYS, dynamic_shapes=(None, {1: past + 1}, {2: past}))
    for length in (3, 12, 40, 64):
        call = inputs(length)
        torch.testing.assert_close(rewritten(*call), Cached()(*call))
    for wrong in (65, 0):
        with pytest.raises(InputError, match=r"argument 'mask' .* is at least 1 and at most 64"):
            rewritten(*inputs(wrong))
    new, mask, _ = inputs(5)
    with pytest.raises(InputError, match=r"argument 'cache' .*: 7 is not 5"):
        rewritten(new, mask, inputs(7)[2])
