"""Layers of fixed shape do what the layers of transformers do that grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import CaptureError, Generator, InputError, RewriteConfig, rewrite_for_generation
from neuron_attn_rewrite.generation.layers import FixedLayer, Room, SlidingLayer, fixed
from neuron_attn_rewrite.generation.own import Answers, OwnCache, own_cache
from neuron_attn_rewrite.generation.position import Position, Slicing, Width
from neuron_attn_rewrite.generation.step import Names, State, grown_cache, step_of
from tests.generation.models import make
from tests.models import VOCABULARY

BATCH, CAPACITY, WINDOW, SPARE = 2, 24, 6, 2


@pytest.fixture(scope="module")
def mistral() -> Any:
    return make("Mistral", sliding_window=WINDOW)


def place(start: int, count: int) -> Tensor:
    return torch.tensor([start, count])


def state_of(model: Any, capacity: int = CAPACITY, spare: int | None = SPARE) -> tuple[Names, State]:
    names = Names.of(model)
    first = {names.tokens: torch.zeros(BATCH, 1, dtype=torch.int64)}
    return names, State.of(grown_cache(model, names, first), Room(BATCH, capacity, place(0, 0), spare))


def prompt(length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, VOCABULARY, (BATCH, CAPACITY), generator=torch.Generator().manual_seed(length))
    mask = torch.ones(BATCH, CAPACITY, dtype=torch.int64)
    mask[1, : length // 2] = 0
    return tokens, mask


class Run:
    """Calls of a model with layers of fixed shape, without a graph."""

    def __init__(self, model: Any, tokens: Tensor, mask: Tensor, gap: int = 0) -> None:
        self.names, self.state = state_of(model)
        self.steps = {fresh: step_of(model, self.names, self.state, fresh) for fresh in (True, False)}
        self.cache = [t.clone() for t in self.state.tensors]
        self.tokens, self.mask, self.gap = tokens, mask, gap

    def call(self, begin: int, end: int, fill: int = 0) -> Tensor:
        """Logits of the tokens, the call filled up at the right with some that do not count."""
        fresh, gap = begin == 0, self.gap
        before = gap if fresh else 0
        width = end + gap + fill if fresh else CAPACITY + self.state.held
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, begin:end]
        pad = torch.nn.functional.pad
        mask = pad(self.mask[:, :end], (gap, width - gap - end))
        inputs = {
            self.names.tokens: pad(self.tokens[:, begin:end], (before, fill), value=3),
            self.names.mask: mask if fresh or self.state.kind.attends else mask[:, gap + begin : gap + end],
            self.names.positions: pad(positions, (before, fill)),
        }
        given = {name: t for name, t in inputs.items() if name is not None}
        at = place(0 if fresh else gap + begin, end - begin + before)
        with torch.no_grad():
            logits, self.cache = self.steps[fresh](at, self.cache, given)
        return logits[:, before : before + end - begin]


def expected(model: Any, tokens: Tensor, mask: Tensor, end: int) -> Tensor:
    """Logits of a call without a cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, :end]
    with torch.no_grad():
        given = {"position_ids": positions} if Names.of(model).positions else {}
        result: Tensor = model(tokens[:, :end], attention_mask=mask[:, :end], **given, use_cache=False).logits
    return result


def check(found: Tensor, wanted: Tensor, mask: Tensor) -> None:
    seen = mask.bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-3, atol=1e-3)


CALLS = {
    "step by step": [(0, 3), *((n, n + 1) for n in range(3, 20))],
    "a long prompt": [(0, 15), (15, 16), (16, 17)],
    "in pieces": [(0, 4), (4, 12), (12, 20)],
    "several at once": [(0, 2), (2, 5), (5, 9), (9, 10), (10, 14)],
}


@pytest.mark.parametrize("fill", [0, 2])
@pytest.mark.parametrize("way", CALLS)
def test_a_window_shows_the_same_tokens(mistral: Any, way: str, fill: int) -> None:
    tokens, mask = prompt(len(way))
    run = Run(mistral, tokens, mask)
    assert all(t.shape[2] == WINDOW - 1 + SPARE for t in run.cache)
    wanted = expected(mistral, tokens, mask, CAPACITY)
    for begin, end in CALLS[way]:
        rest = min(fill, CAPACITY - end)
        check(run.call(begin, end, rest if end - begin > 1 else 0), wanted[:, begin:end], mask[:, begin:end])


def test_a_window_that_shows_more_gives_other_numbers(mistral: Any) -> None:
    wider = make("Mistral", sliding_window=WINDOW + 1)
    tokens, mask = prompt(9)
    a, b = (Run(model, tokens, mask).call(0, 15) for model in (mistral, wider))
    assert (a - b).abs().max() > 0.1


def test_which_layers_hold_the_last_tokens_alone() -> None:
    layer = transformers.cache_utils.DynamicSlidingWindowLayer(WINDOW)
    layer.update(torch.randn(BATCH, 2, 1, 8), torch.randn(BATCH, 2, 1, 8))
    full = transformers.cache_utils.DynamicLayer()
    full.update(torch.randn(BATCH, 2, 1, 8), torch.randn(BATCH, 2, 1, 8))

    def made(layer: Any, capacity: int, spare: int | None) -> Any:
        cache = transformers.DynamicCache()
        cache.layers = [layer]
        return fixed(cache, Room(BATCH, capacity, place(0, 0), spare)).layers[0]

    held = made(layer, CAPACITY, SPARE)
    assert type(held) is SlidingLayer
    assert held.keys.shape == (BATCH, 2, WINDOW - 1 + SPARE, 8)
    for other in (made(layer, WINDOW + 1, SPARE), made(layer, CAPACITY, None), made(full, CAPACITY, SPARE)):
        assert type(other) is FixedLayer
        assert other.keys.shape[2] == other.capacity
    assert type(made(layer, WINDOW + 2, SPARE)) is SlidingLayer


def test_a_derived_layer_is_not_known() -> None:
    class Compressed(transformers.cache_utils.DynamicSlidingWindowLayer):  # type: ignore[misc]
        """Keeps more than keys and values, as layers of some models do."""

    cache = transformers.DynamicCache()
    cache.layers = [Compressed(WINDOW)]
    cache.layers[0].update(torch.randn(BATCH, 2, 1, 8), torch.randn(BATCH, 2, 1, 8))
    with pytest.raises(CaptureError, match="the cache has a Compressed, and no layer of fixed shape is known"):
        fixed(cache, Room(BATCH, CAPACITY, place(0, 0)))


# A generator


@pytest.fixture(scope="module")
def generator(mistral: Any) -> Generator:
    return rewrite_for_generation(
        mistral,
        batch_size=3,
        max_length=32,
        prompt_lengths=10,
        decode_lengths=(1, 3),
        config=RewriteConfig(policy="always"),
        verify=False,
    )


def test_masks_of_a_window_are_proven(generator: Generator) -> None:
    assert all(site.kernel == "flash_fwd" for report in generator.reports.values() for site in report.sites)
    masks = {name: str(report.sites[0].mask) for name, report in generator.reports.items()}
    # One that is shifted by what is held, for every position.
    assert masks["decode[3]"].startswith(f"sliding_window({WINDOW}, offset={WINDOW - 1 + 2})")
    assert masks["decode"].startswith("key >= 2 & key_padding")
    assert all(t.shape[2] == WINDOW - 1 + 2 for t in generator._state.tensors)


@pytest.mark.parametrize("length", [2, 6, 10, 11, 23])
def test_tokens_with_a_window(mistral: Any, generator: Generator, length: int) -> None:
    tokens = torch.randint(1, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(length))
    mask = (torch.arange(length) >= torch.arange(3)[:, None] * length // 4).long()
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), mistral.generate(tokens, **options))
    options |= {"attention_mask": mask[2:], "num_beams": 3}
    assert torch.equal(generator.generate(tokens[2:], **options), mistral.generate(tokens[2:], **options))


@pytest.mark.parametrize("proposed", [2, 5, 8])
@pytest.mark.parametrize("length", [4, 10, 14])
def test_tokens_are_taken_back(mistral: Any, generator: Generator, length: int, proposed: int) -> None:
    tokens = torch.randint(1, 5, (1, length), generator=torch.Generator().manual_seed(3))  # few words: n-grams repeat
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 14, "do_sample": False}
    options["eos_token_id"] = VOCABULARY  # older versions need one; this one is never generated
    found = generator.generate(tokens, prompt_lookup_num_tokens=proposed, **options)
    assert torch.equal(found, mistral.generate(tokens, **options))


def test_more_tokens_than_are_held_are_not_taken_back(generator: Generator) -> None:
    cache, progress = generator._cache, generator._progress
    tokens = torch.randint(1, VOCABULARY, (1, 14))
    generator.generate(tokens, max_new_tokens=2, do_sample=False)
    progress = generator._progress
    assert progress.tokens == 15
    before = [t.clone() for t in generator._state.tensors]
    with pytest.raises(InputError, match=r"3 tokens are taken back.*decode_lengths=\(1, 4\)"):
        cache.crop(-3)
    assert progress.tokens == 15
    assert all(torch.equal(a, b) for a, b in zip(before, generator._state.tensors, strict=True))
    cache.crop(-1)
    with pytest.raises(InputError, match="3 tokens are taken back"):
        cache.crop(-2)
    cache.crop(-1)
    assert generator._progress.tokens == 13
    generator.generate(tokens[:, :4], max_new_tokens=2, do_sample=False)
    cache.crop(-4)  # nothing was dropped yet
    assert generator._progress.tokens == 1


# Positions


def test_a_position_answers_what_is_known() -> None:
    position = Position(torch.tensor(4), 1, 9)
    always = (position > 0, position >= 1, position < 10, position <= 9, position != 0, position != 10, bool(position))
    assert all(answer is True for answer in always)
    never = (5 + position - 20 > 0, position < 1, position >= 10, position == 0, position == 10)
    assert all(answer is False for answer in never)
    assert max(0, 1 - position) == 0 and (10 - position > 0) is True and int((10 - position).tensor) == 6


def test_a_position_is_a_tensor_where_the_answer_depends() -> None:
    position = Position(torch.tensor(4), 1, 9)
    depends = (position > 1, position >= 2, position < 9, position <= 8, position == 1, position == 9, position != 4)
    assert [bool(answer) for answer in depends] == [True, True, True, True, False, False, False]
    assert all(isinstance(answer, Tensor) for answer in depends)
    assert len(range(position)) == 4


def test_operators_take_a_position_as_a_tensor() -> None:
    position = Position(torch.tensor(4), 1, 9) + 1
    assert torch.equal(torch.arange(3) + position, torch.tensor([5, 6, 7]))
    assert torch.equal(torch.arange(3) - position, torch.tensor([-5, -4, -3]))
    found = (2 * position, position * 2, position - torch.tensor(1), 9 - position, position // 2, position % 3)
    assert [int(value) for value in found] == [10, 10, 4, 4, 2, 2]
    assert int(-position) == -5 and (-position < 0) is True and float(position / 2) == 2.5
    assert position.dtype == torch.int64 and position.view(1).shape == (1,)


def test_the_number_of_new_positions_is_known() -> None:
    position = Position(torch.tensor(4), 1, 9)
    assert torch.equal(torch.arange(position, position + 3), torch.tensor([4, 5, 6]))
    assert torch.equal(torch.arange(position + 1, position + 5, 2, dtype=torch.float32), torch.tensor([5.0, 7.0]))
    assert len(torch.arange(position)) == 4


def test_a_slice_of_new_positions() -> None:
    position, rows = Position(torch.tensor(4), 1, 9), torch.arange(24).view(12, 2)
    with Slicing():
        assert torch.equal(rows[position : position + 3], rows[4:7])
        assert torch.equal(rows[position - 1 : position + 3 : 2, 1], rows[3:7:2, 1])
        assert torch.equal(rows[None, position : position + 2, None], rows[None, 4:6, None])
        assert torch.equal(rows[: position + 1], rows[:5])
        assert torch.equal(rows[-2:, 0], torch.tensor([20, 22]))
        rows[position : position + 2, 0] = -1
    assert rows[:, 0].tolist() == [0, 2, 4, 6, -1, -1, 12, 14, 16, 18, 20, 22]


class Writes(torch.nn.Module):
    """Writes into a tensor, at the number of cached tokens."""

    def __init__(self, into_slice: bool) -> None:
        super().__init__()
        self.into_slice = into_slice

    def forward(self, place: Tensor, rows: Tensor, new: Tensor) -> Tensor:
        with Slicing():
            past, rows = Position(place[0], 1, CAPACITY - 2), rows.clone()
            if self.into_slice:
                rows[past : past + 2].copy_(new)
            else:
                rows[past : past + 2] = new
        return rows


def test_a_slice_by_positions_can_be_written() -> None:
    rows, new = torch.zeros(CAPACITY, 3), torch.ones(2, 3)
    graph = torch.export.export(Writes(False), (place(3, 2), rows, new), strict=False).module()
    for count in (1, 7, CAPACITY - 2):
        assert graph(place(count, 2), rows, new)[:, 0].nonzero()[:, 0].tolist() == [count, count + 1]


@pytest.mark.parametrize("is_captured", [True, False])
def test_a_write_into_the_copy_of_a_slice_is_an_error(is_captured: bool) -> None:
    given = place(3, 2), torch.zeros(CAPACITY, 3), torch.ones(2, 3)
    with pytest.raises(CaptureError, match="the model writes into a slice"):
        if is_captured:
            torch.export.export(Writes(True), given, strict=False)
        else:
            Writes(True)(*given)


class Asks(torch.nn.Module):
    """A model that computes with the number of cached tokens."""

    def forward(self, place: Tensor, keys: Tensor) -> Tensor:
        layer = FixedLayer(keys, keys, place)
        past = layer.get_seq_length()
        if past == 0 or past + 2 > CAPACITY + 1 or not past:
            return keys
        return torch.arange(past, past + 2, device=keys.device)


def test_the_number_of_cached_tokens_is_known_while_a_graph_is_captured() -> None:
    keys = torch.zeros(BATCH, 2, CAPACITY, 4)
    graph = torch.export.export(Asks(), (place(3, 2), keys), strict=False).module()
    for count in (1, 7, CAPACITY - 1):
        assert torch.equal(graph(place(count, 2), keys), torch.tensor([count, count + 1]))


def test_a_layer_that_nothing_is_written_into_stays() -> None:
    cache = transformers.DynamicCache()
    cache.update(torch.ones(BATCH, 2, 1, 4), torch.ones(BATCH, 2, 1, 4), 1)
    unused, used = fixed(cache, Room(BATCH, CAPACITY, place(0, 0))).layers
    assert unused.keys is None and used.keys.shape == (BATCH, 2, CAPACITY, 4)
    cross = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    cross.cross_attention_cache.layers = [type(unused)()]
    assert fixed(cross, Room(BATCH, CAPACITY, place(0, 0))).cross_attention_cache.layers[0].keys is None


def test_a_width_is_as_large_as_it_may_be() -> None:
    width = Width(torch.tensor(4), 1, 9) + 1
    assert torch.full((2, width), 0.0).shape == (2, 10)
    assert len(torch.arange(width)) == len(range(width)) == 10
    assert torch.arange(20)[:width].shape == (10,)


def test_what_models_ask_about_positions_and_masks() -> None:
    positions, other = torch.arange(4) + 2, torch.arange(4)
    with Answers(positions, (1, 9), 9):
        assert (positions[0] > 0) is True
        assert int(positions[-1] + 1) == 10
        assert isinstance(other[0] > 0, Tensor)
        assert isinstance(positions[1] > 0, Tensor)
        assert torch.all(torch.ones(2)) is False
        assert isinstance(torch.all(torch.ones(2, 2), 1), Tensor)


# Caches of a model's own kind


class Lists:
    """A cache as some models of transformers have: states that stay, keys and values that grow."""

    def __init__(self) -> None:
        self.has_previous_state = False
        self.states = [torch.zeros(BATCH, 3), torch.tensor([[]] * BATCH)]
        self.key_cache = [torch.tensor([[]] * BATCH)] * 2
        self.value_cache = [torch.tensor([[]] * BATCH)] * 2

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("only a cache of fixed shape is called")


def a_call(cache: Any) -> Any:
    """As a model that makes its cache if it gets none."""
    if cache is None:
        return Lists()
    cache.states[0] = cache.states[0] + 1
    cache.update(torch.ones(BATCH, 2, 1, 4), torch.ones(BATCH, 2, 1, 5), 1)
    cache.has_previous_state = True
    return cache


def test_a_cache_with_lists_gets_a_layer_for_each_attention() -> None:
    cache = own_cache(Lists, a_call)
    assert isinstance(cache, OwnCache) and isinstance(cache, Lists)
    assert type(cache).__name__ == "Lists"
    fixed(cache, Room(BATCH, CAPACITY, place(0, 0)))
    assert [*cache.rows] == [1]
    assert cache.rows[1].keys.shape == (BATCH, 2, CAPACITY, 4)
    assert cache.rows[1].values.shape == (BATCH, 2, CAPACITY, 5)
    assert cache.states[1] is None and cache.key_cache == [None, None]
    assert cache.has_previous_state
    assert cache.get_mask_sizes(torch.arange(2)) == (CAPACITY, 0)
    cache.reset()
    assert not cache.has_previous_state
    assert not cache.states[0].any()
    assert cache.get_mask_sizes(torch.arange(2)) == (2, 0)
    assert "__init__" in vars(Lists) and Lists().states[0].shape == (BATCH, 3)


RECURRENT: dict[str, tuple[dict[str, Any], int]] = {
    "Mamba": ({"state_size": 4, "expand": 2, "time_step_rank": 4}, 4),
    "Lfm2": ({"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8}, 0),
}
"""Fields of the config, and how many tokens are filled in. Lfm2 of older versions does not mask them in its states."""


@pytest.mark.parametrize("kind", RECURRENT)
def test_states_are_those_of_the_model(kind: str) -> None:
    fields, gap = RECURRENT[kind]
    model = make(kind, **fields)
    tokens, mask = prompt(8)
    mask[:] = 1
    run = Run(model, tokens, mask, gap)
    again = [tuple(t.shape) for t in run.cache]
    wanted = expected(model, tokens, mask, 12)
    for _ in range(2):  # what the first sequence leaves is no part of the second
        for begin, end in ((0, 8), *((n, n + 1) for n in range(8, 12))):
            check(run.call(begin, end)[:, -1:], wanted[:, end - 1 : end], mask[:, :1])
    assert [tuple(t.shape) for t in run.cache] == again


def test_padding_of_a_long_prompt_does_not_change_states() -> None:
    model = make("Mamba2", state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=8)
    generator = rewrite_for_generation(model, batch_size=3, max_length=20, prompt_lengths=4, verify=False)
    tokens = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(12) >= torch.tensor([0, 7, 10])[:, None]).long()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(generator.generate(tokens, attention_mask=mask, **options), expected)
    before = [t.clone() for t in generator._state.tensors]
    with pytest.raises(InputError, match="the mask hides tokens behind others after the first 4"):
        generator.generate(tokens, attention_mask=mask.flip(1), **options)
    assert all(torch.equal(a, b) for a, b in zip(before, generator._state.tensors, strict=True))


def test_tokens_are_taken_back_from_a_state() -> None:
    model = make("Lfm2", **RECURRENT["Lfm2"][0])
    generator = rewrite_for_generation(model, max_length=40, prompt_lengths=8, verify=False)
    tokens = torch.randint(1, 5, (1, 8), generator=torch.Generator().manual_seed(3))  # few words: n-grams repeat
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 24, "do_sample": False}
    options["eos_token_id"] = VOCABULARY  # older versions need one; this one is never generated
    expected = model.generate(tokens, **options)
    assert torch.equal(generator.generate(tokens, prompt_lookup_num_tokens=3, **options), expected)
    with pytest.raises(InputError, match="tokens are taken back, and the state of this model still holds them"):
        generator._cache.crop(-10)


def test_a_model_that_caches_no_tensors_is_refused(mistral: Any) -> None:
    class Forgets(type(mistral)):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
            return {"logits": super().forward(input_ids, use_cache=False).logits, "past_key_values": "nothing"}

    model = Forgets(mistral.config).eval()
    with pytest.raises(CaptureError, match="gives a str without tensors as past_key_values"):
        grown_cache(model, Names.of(model), {"input_ids": torch.zeros(BATCH, 1, dtype=torch.int64)})
