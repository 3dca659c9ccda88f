"""Objects among the inputs, caches above all, are taken, and changed as the model changes them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from neuron_attn_rewrite import CaptureError, InputError, RewriteError, RewrittenModule, rewrite, rewrite_for_trace
from neuron_attn_rewrite.capture.objects import leaves
from tests.capture.test_objects import TOLERANCE, default_model
from tests.helpers import ALWAYS, relative_error

LENGTH = 24
"""Of a static cache and of the texts."""


def text(seed: int) -> Tensor:
    return torch.randint(1, 128, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=LENGTH)


class Steps:
    """A model and the call of one token after `length` others."""

    def __init__(self, name: str, make: Callable[[Any], Any]) -> None:
        self.model: Any = default_model(name)
        self.is_decoder, self.make, self.is_static = name == "t5", make, make is static

    def cache(self, length: int, seed: int) -> Any:
        """A cache that holds this many tokens."""
        cache = self.make(self.model)
        if self.is_decoder:
            cache = EncoderDecoderCache(cache, dynamic(self.model))
        if length:
            with torch.no_grad():
                args, kwargs = self.inputs(0, length, seed)
                self.model(*args, **kwargs, past_key_values=cache)
        return cache

    def inputs(self, past: int, new: int, seed: int) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Without the cache. The second row has two tokens of padding on the left."""
        ids, given = text(seed), dict[str, Any](use_cache=True)
        if self.is_decoder:
            return (ids,), {**given, "decoder_input_ids": text(seed + 1)[:, past : past + new]}
        mask = torch.ones(2, LENGTH if self.is_static else past + new, dtype=torch.long)
        mask[1, :2] = 0
        if self.is_static:
            given["cache_position"] = torch.arange(past, past + new)
        return (ids[:, past : past + new],), {**given, "attention_mask": mask}

    def rewritten(self, past: int, **options: Any) -> RewrittenModule:
        args, kwargs = self.inputs(past, 1, 0)
        return rewrite(self.model, args, {**kwargs, "past_key_values": self.cache(past, 0)}, config=ALWAYS, **options)

    def agree(self, rewritten: RewrittenModule, past: int, seed: int) -> None:
        """The rewritten module gives what the model gives, and does to the cache what the model does."""
        args, kwargs = self.inputs(past, 1, seed)
        mine, its = self.cache(past, seed), self.cache(past, seed)
        layers = [*getattr(mine, "layers", ())]
        with torch.no_grad():
            new = rewritten(*args, **kwargs, past_key_values=mine)
            old = self.model(*args, **kwargs, past_key_values=its)
        assert relative_error(new.logits, old.logits) < TOLERANCE
        assert new.past_key_values is mine and all(a is b for a, b in zip(layers, getattr(mine, "layers", ())))  # noqa: B905
        assert int(mine.get_seq_length()) == int(its.get_seq_length()) == past + 1
        assert_same_tensors(mine, its)


def assert_same_tensors(mine: Any, its: Any) -> None:
    parts, its_parts = leaves(mine), leaves(its)
    assert [type(p) for p in parts] == [type(p) for p in its_parts]
    for a, b in zip(parts, its_parts, strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert not a.numel() or relative_error(a.double(), b.double()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "t5"])
def test_a_dynamic_cache_grows_as_with_the_model(name: str) -> None:
    steps = Steps(name, dynamic)
    rewritten = steps.rewritten(12)
    assert not rewritten.report.kept and rewritten.report.capture_error is not None
    steps.agree(rewritten, 12, 3)


@pytest.mark.filterwarnings("ignore:the captured graph does not read its input cache_position")  # the cache counts
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_graph_serves_every_step_of_a_static_cache(name: str) -> None:
    steps = Steps(name, static)
    rewritten = steps.rewritten(9)
    assert not rewritten.report.kept
    for past, seed in ((9, 3), (10, 4), (22, 5), (3, 6)):
        steps.agree(rewritten, past, seed)


def test_an_empty_cache_is_filled() -> None:
    steps = Steps("llama", dynamic)
    args, kwargs = steps.inputs(0, 9, 0)
    rewritten = rewrite(steps.model, args, {**kwargs, "past_key_values": dynamic(steps.model)}, config=ALWAYS)
    assert not rewritten.report.kept
    args, kwargs = steps.inputs(0, 9, 3)
    mine, its = dynamic(steps.model), dynamic(steps.model)
    with torch.no_grad():
        rewritten(*args, **kwargs, past_key_values=mine)
        steps.model(*args, **kwargs, past_key_values=its)
        args, kwargs = steps.inputs(9, 1, 3)
        steps.model(*args, **kwargs, past_key_values=mine)  # the model goes on from it
        steps.model(*args, **kwargs, past_key_values=its)
    assert mine.get_seq_length() == 10
    args, kwargs = steps.inputs(0, 9, 3)
    with pytest.raises(
        InputError, match=r"another object than the captured one: \.layers\[0\]\.keys is a tensor, and was"
    ):
        rewritten(*args, **kwargs, past_key_values=mine)
    with pytest.raises(InputError, match=r"'past_key_values' is None, and was a DynamicCache\. Give an object"):
        rewritten(*args, **kwargs)
    assert_same_tensors(*([t[:1] for t in leaves(cache)] for cache in (mine, its)))  # without the row of padding


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_any_length(name: str) -> None:
    steps = Steps(name, dynamic)
    past = torch.export.Dim("past", min=2, max=20)
    shapes = {"input_ids": None, "attention_mask": {1: past + 1}, "past_key_values": {2: past}, "use_cache": None}
    rewritten = steps.rewritten(5, dynamic_shapes=shapes)
    assert not rewritten.report.kept
    for length in (3, 7, 19):
        steps.agree(rewritten, length, length)


def test_another_state_of_a_cache_is_refused() -> None:
    steps = Steps("mistral", dynamic)  # its layers count tokens in a number of Python
    rewritten = steps.rewritten(12)
    args, kwargs = steps.inputs(13, 1, 0)
    kwargs["attention_mask"] = kwargs["attention_mask"][:, 1:]
    cache = steps.cache(13, 0)
    before = copy.deepcopy(leaves(cache))
    with pytest.raises(InputError, match=r"'past_key_values'.*\.layers\[0\]\.cumulative_length is 13, and was 12"):
        rewritten(*args, **kwargs, past_key_values=cache)
    assert all(map(torch.equal, before, leaves(cache))), "nothing is written"


class Store:
    """An object of the caller's own that refers to itself."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.twin, self.count = x, x * 2, 0
        self.items, self.notes, self.table = [x + 1], ["a"], {"pair": (x + 2, 7)}
        self.old = x + 3
        self.itself = self


class Changing(nn.Module):
    def forward(self, q: Tensor, store: Store) -> tuple[Tensor, Store]:
        out = scaled_dot_product_attention(q, store.x, store.twin)
        store.x, store.twin = store.twin, store.x
        store.items[0].add_(1)
        store.items.append(out)
        store.notes.append("b")
        store.table["pair"] = (store.table["pair"][0] * 2, 8)
        store.table["new"] = out + 1
        store.count += 1
        store.itself.late = out * 2  # type: ignore[attr-defined]
        del store.old
        return out, store


def test_whatever_a_model_does_to_an_object() -> None:
    q, x = torch.randn(2, 1, 2, 8, 4)
    rewritten = rewrite(Changing(), (q, Store(x)), config=ALWAYS)
    assert not rewritten.report.kept
    q, x = torch.randn(2, 1, 2, 8, 4)
    mine, its = Store(x), Store(x)
    items, x_before, item = mine.items, mine.x, mine.items[0]
    out, store = rewritten(q, mine)
    wanted, _ = Changing()(q, its)
    assert store is mine and mine.items is items and mine.items[0] is item and mine.twin is x_before
    assert not hasattr(mine, "old") and mine.itself is mine
    assert (mine.count, mine.notes, mine.table["pair"][1]) == (1, ["a", "b"], 8)
    assert relative_error(out, wanted) < TOLERANCE
    mine.itself = its.itself = None  # type: ignore[assignment]
    assert vars(mine).keys() == vars(its).keys()
    assert_same_tensors(mine, its)
    with pytest.raises(InputError, match="'store' is another object"):
        rewritten(q, mine)


class Counted:
    """Registered with its tensor only, as some caches are."""

    def __init__(self, x: Tensor, count: int) -> None:
        self.x, self.count = x, count


pytree.register_pytree_node(Counted, lambda c: ([c.x], None), lambda children, _: Counted(*children, 0))


class UsesCount(nn.Module):
    def forward(self, q: Tensor, counted: Counted) -> Tensor:
        counted.count += 1
        return scaled_dot_product_attention(q, counted.x, counted.x, is_causal=True) * counted.count


def test_a_registered_class_keeps_what_its_registration_drops() -> None:
    q, x = torch.randn(2, 1, 2, 8, 4)
    rewritten = rewrite(UsesCount(), (q, Counted(x, 3)), config=ALWAYS)
    counted = Counted(x, 3)
    assert relative_error(rewritten(q, counted), UsesCount()(q, Counted(x, 3))) < TOLERANCE
    assert counted.count == 4
    with pytest.raises(InputError, match="count is 4, and was 3"):
        rewritten(q, counted)


class Two(nn.Module):
    def forward(self, q: Tensor, first: Counted, second: Counted) -> Tensor:
        first.x.add_(1)
        return scaled_dot_product_attention(q, first.x, second.x)


def test_one_object_given_twice_is_refused() -> None:
    q, x = torch.randn(2, 1, 2, 8, 4)
    both = Counted(x, 0)
    with pytest.raises(InputError, match="the same Counted twice"):
        rewrite(Two(), (q, both, both))
    rewritten = rewrite(Two(), (q, Counted(x, 0), Counted(x + 1, 0)), config=ALWAYS)
    first, second = Counted(x.clone(), 0), Counted(x + 1, 0)
    wanted = Two()(q, Counted(x.clone(), 0), second)
    assert relative_error(rewritten(q, first, second), wanted) < TOLERANCE
    assert torch.equal(first.x, x + 1) and torch.equal(second.x, x + 1)
    with pytest.raises(InputError, match="the same Counted twice"):
        rewritten(q, both, both)


class Secretive(nn.Module):
    """Does more to an object than an exported graph shows."""

    def forward(self, q: Tensor, store: Store) -> Tensor:
        if not torch.compiler.is_exporting():
            store.twin.mul_(2)
        return scaled_dot_product_attention(q, store.x, store.x)


def test_what_the_graph_does_not_do_to_an_object_is_an_error() -> None:
    q, x = torch.randn(2, 1, 2, 8, 4)
    with pytest.raises(CaptureError, match="not the model"):
        rewrite(Secretive(), (q, Store(x)), config=ALWAYS)


class Puts(nn.Module):
    def __init__(self, put: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.put = put

    def forward(self, q: Tensor, caches: Any) -> Tensor:
        self.put(caches, q)
        (keys,) = [cache for cache in pytree.tree_leaves(caches) if cache is not q]
        return scaled_dot_product_attention(q, keys, keys)


@pytest.mark.parametrize(
    ("put", "around"),
    [
        (lambda caches, q: caches.append(q), lambda keys: [keys]),
        (lambda caches, q: caches.__setitem__(0, caches[0] + q), lambda keys: [keys]),
        (lambda caches, q: caches[0].pop(), lambda keys: ([keys, keys + 1],)),
        (lambda caches, q: caches.update(new=q), lambda keys: {"old": keys}),
        (lambda caches, q: caches.append(q), lambda keys: deque([keys], maxlen=3)),
    ],
    ids=["append", "replace", "pop", "update", "deque"],
)
def test_lists_and_dicts_that_the_model_changes(put: Callable[[Any, Tensor], Any], around: Any) -> None:
    """Not silently without the change: the next call would go on from the old entries. An object may hold them."""
    q, keys = torch.randn(2, 1, 2, 8, 4)
    with pytest.raises(CaptureError, match="the model changes the entries of a list, dict or deque"):
        rewrite(Puts(put), (q, around(keys)), config=ALWAYS)


def test_one_tensor_in_two_places_is_not_two_tensors() -> None:
    class Twice(nn.Module):
        def forward(self, q: Tensor, store: Store) -> Tensor:
            store.x.mul_(2)
            return scaled_dot_product_attention(q, store.x, store.twin)

    q, x = torch.randn(2, 1, 2, 8, 4)
    rewritten, store = rewrite(Twice(), (q, Store(x)), config=ALWAYS), Store(x)
    store.twin = store.x
    with pytest.raises(InputError, match=r"\.twin is the same tensor as another part in one of them"):
        rewritten(q, store)


def test_lists_that_the_model_writes_into_are_as_they_were() -> None:
    q, keys = torch.randn(2, 1, 2, 8, 4)
    model, mine, its = Puts(lambda caches, q: caches[0].mul_(2)), [keys.clone()], [keys.clone()]
    rewritten = rewrite(model, (q, [keys]), config=ALWAYS)
    assert relative_error(rewritten(q, mine), model(q, its)) < TOLERANCE
    assert torch.equal(mine[0], its[0])


def test_where_an_object_can_not_go(tmp_path: Path) -> None:
    steps = Steps("llama", dynamic)
    args, kwargs = steps.inputs(5, 1, 0)
    inputs = {"input_ids": args[0], **kwargs, "past_key_values": steps.cache(5, 0)}
    with pytest.raises(InputError, match="is a DynamicCache, and a trace takes tensors"):
        rewrite_for_trace(steps.model, inputs)
    with pytest.raises(RewriteError, match="takes an object, such as a cache, can't be saved"):
        steps.rewritten(5).save(tmp_path / "step")
