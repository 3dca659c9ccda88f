"""A generator gives the tokens of `model.generate`."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import (
    CaptureError,
    Generator,
    InputError,
    RewriteConfig,
    RewriteError,
    RewriteWarning,
    rewrite_for_generation,
)
from tests.generation.models import make
from tests.models import VOCABULARY

CONFIG = RewriteConfig(policy="always")
MAX_LENGTH, BATCH = 48, 3


@pytest.fixture(scope="module")
def llama() -> Any:
    return make()


@pytest.fixture(scope="module")
def generator(llama: Any) -> Generator:
    return rewrite_for_generation(
        llama, batch_size=BATCH, max_length=MAX_LENGTH, prompt_lengths=(8, 16), decode_lengths=(1, 4), config=CONFIG
    )


def prompt(rows: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and a mask with another padding on the left of each row."""
    tokens = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(rows)[:, None] * length // (rows + 1)
    return tokens, (torch.arange(length) >= padding).long()


def test_the_graphs_and_their_reports(generator: Generator) -> None:
    assert list(generator.graphs) == ["prefill[8]", "prefill[16]", "decode", "decode[4]", "decode[16]"]
    for name, report in generator.reports.items():
        assert [site.kernel for site in report.sites] == ["flash_fwd"] * 2, name
    assert "causal(offset=0)" in str(generator.reports["prefill[8]"].sites[0].mask)
    assert "key <=" in str(generator.reports["decode"].sites[0].mask)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16, 17, 23, 32, 40])
def test_tokens_with_padding_on_the_left(llama: Any, generator: Generator, length: int) -> None:
    tokens, mask = prompt(BATCH, length, seed=length)
    options = {"attention_mask": mask, "max_new_tokens": MAX_LENGTH - length if length > 20 else 8, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), llama.generate(tokens, **options))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_and_tokens_of_other_dtypes(llama: Any, generator: Generator, dtype: torch.dtype) -> None:
    tokens, mask = prompt(BATCH, 13)
    options = {"attention_mask": mask.to(dtype), "max_new_tokens": 5, "do_sample": False}
    expected = llama.generate(tokens, **options)
    assert torch.equal(generator.generate(tokens, **options), expected)
    assert torch.equal(generator.generate(tokens.int(), **options), expected)


NO_END = {"eos_token_id": VOCABULARY}
"""Older versions need one to speculate. This one is never generated."""
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "n-grams of the prompt": {"prompt_lookup_num_tokens": 3, **NO_END},
    "many n-grams": {"prompt_lookup_num_tokens": 7, **NO_END},
    "an end": {"eos_token_id": 5, "max_new_tokens": 20},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "total length": {"max_new_tokens": None, "max_length": 25},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(llama: Any, generator: Generator, way: str) -> None:
    tokens = torch.randint(1, 6, (1, 13), generator=torch.Generator().manual_seed(3))  # few words: n-grams repeat
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(tokens), **WAYS[way]}

    def run(generate: Any) -> Tensor:
        torch.manual_seed(7)
        result: Tensor = generate(tokens, **options)
        return result

    assert torch.equal(run(generator.generate), run(llama.generate))


def test_an_assistant_proposes_tokens(llama: Any, generator: Generator) -> None:
    assistant = make(num_hidden_layers=1)
    tokens, _ = prompt(1, 11)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens), **NO_END}
    expected = llama.generate(tokens, **options)
    assert torch.equal(generator.generate(tokens, assistant_model=assistant, **options), expected)


def test_a_call_starts_anew_and_takes_fewer_rows(llama: Any, generator: Generator) -> None:
    for rows, length in ((3, 20), (1, 6), (2, 30)):
        tokens, mask = prompt(rows, length)
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(generator.generate(tokens, **options), llama.generate(tokens, **options))


def test_the_model_is_as_it_was(llama: Any, generator: Generator) -> None:
    assert "forward" not in vars(llama)
    tokens, mask = prompt(2, 6)
    with torch.no_grad():
        assert llama(input_ids=tokens, attention_mask=mask).logits.shape == (2, 6, VOCABULARY)


def test_scores_and_a_streamer(llama: Any, generator: Generator) -> None:
    class Collect(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.tokens.append(value.flatten())

        def end(self) -> None:
            self.tokens.append(torch.tensor([-1]))

    tokens, _ = prompt(1, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options["attention_mask"] = torch.ones_like(tokens)
    streams = Collect(), Collect()
    new, old = (
        model.generate(tokens, streamer=stream, **options)
        for model, stream in zip((generator, llama), streams, strict=True)
    )
    assert [t.tolist() for t in streams[0].tokens] == [t.tolist() for t in streams[1].tokens]
    for a, b in zip(new.logits, old.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# What does not fit


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "long prompt": ({"length": 60}, "60 tokens and 4 new ones do not fit max_length=48"),
    "too many new tokens": ({"length": 40, "max_new_tokens": 9}, "do not fit max_length=48"),
    "too long a total": ({"max_new_tokens": None, "max_length": 49}, "do not fit max_length=48"),
    "empty prompt": ({"length": 0}, "with at least one token"),
    "too many rows": ({"rows": 4}, "4 sequences, beams counted, do not fit batch_size=3"),
    "too many beams": ({"num_beams": 2}, "6 sequences, beams counted"),
    "mask of another shape": ({"attention_mask": torch.ones(3, 7)}, "attention_mask must be [3, 6]"),
    "mask of fractions": ({"attention_mask": torch.full((3, 6), 0.5)}, "attention_mask must hold whole numbers"),
    "a prompt of embeddings": (
        {"inputs_embeds": torch.ones(3, 6, 64)},
        "inputs_embeds can't be given",
    ),
    "a second context": (
        {"guidance_scale": 1.5},
        "guidance_scale can't be given: it calls",
    ),
    "its own assistant": ({"assistant_early_exit": 1}, "assistant_early_exit can't be given"),
    "settings with a kind of cache": (
        {"generation_config": transformers.GenerationConfig(cache_implementation="static")},
        "cache_implementation can't be given",
    ),
    "another cache": ({"past_key_values": transformers.DynamicCache()}, "past_key_values can't be given"),
    "a kind of cache": ({"cache_implementation": "static"}, "cache_implementation can't be given"),
    "no cache": ({"use_cache": False}, "use_cache=False can't be given"),
    "real numbers": ({"dtype": torch.float32}, "must be integers [batch, length]"),
    "attentions": ({"output_attentions": True}, "without output_attentions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_cached(generator: Generator, what: str) -> None:
    options, words = REFUSED[what]
    options = dict(options)
    tokens, mask = prompt(options.pop("rows", 3), options.pop("length", 6))
    tokens = tokens.to(options.pop("dtype", torch.int64))
    before = [t.clone() for t in generator._state.tensors]
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, **options}
    with pytest.raises(InputError, match=words.replace("[", r"\[").replace("]", r"\]")):
        generator.generate(tokens, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, generator._state.tensors, strict=True))


def test_a_generator_is_no_assistant(generator: Generator) -> None:
    with pytest.raises(InputError, match="assistant_model must be a model of transformers"):
        generator.generate(prompt(1, 5)[0], assistant_model=generator, max_new_tokens=4)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_generator_is_not_copied(generator: Generator, duplicate: Any) -> None:
    with pytest.raises(RewriteError, match="a generator can't be copied or pickled: save the model"):
        duplicate(generator)


def test_a_call_inside_of_another_is_refused(llama: Any, generator: Generator) -> None:
    tokens, mask = prompt(2, 6)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}

    def inside(given: Tensor, scores: Tensor) -> Tensor:
        generator.generate(tokens[:1], max_new_tokens=2)
        return scores

    with pytest.raises(InputError, match="this generator is in use"):
        generator.generate(tokens, logits_processor=[inside], **options)
    assert torch.equal(generator.generate(tokens, **options), llama.generate(tokens, **options))


def test_a_call_with_another_cache_is_refused(generator: Generator) -> None:
    tokens, mask = prompt(2, 6)

    def with_another(given: Tensor, scores: Tensor) -> Tensor:
        generator._model(input_ids=tokens, past_key_values=transformers.DynamicCache())
        return scores

    with pytest.raises(InputError, match="the model is called with another past_key_values"):
        generator.generate(tokens, attention_mask=mask, logits_processor=[with_another], max_new_tokens=4)


def test_a_sequence_that_another_took_the_place_of_does_not_go_on(generator: Generator) -> None:
    tokens, mask = prompt(2, 6)

    def without_cache(given: Tensor, scores: Tensor) -> Tensor:
        generator._model(input_ids=tokens)
        return scores

    with pytest.raises(InputError, match="the model is called with another past_key_values"):
        generator.generate(tokens, attention_mask=mask, logits_processor=[without_cache], max_new_tokens=4)


def test_in_inference_mode_and_outside_of_it(llama: Any, generator: Generator) -> None:
    tokens, mask = prompt(2, 6)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = llama.generate(tokens, **options)
    with torch.inference_mode():
        made = rewrite_for_generation(llama, batch_size=2, max_length=12, prompt_lengths=8, verify=False)
        generator.generate(tokens[:1], num_beams=2, max_new_tokens=4, do_sample=False)
    assert torch.equal(made.generate(tokens, **options), expected)
    assert torch.equal(generator.generate(tokens, **options), expected)


@pytest.mark.parametrize("max_length", [2, 3])
def test_the_shortest_sequences(llama: Any, max_length: int) -> None:
    generator = rewrite_for_generation(llama, batch_size=2, max_length=max_length, prompt_lengths=1, config=CONFIG)
    tokens, _ = prompt(2, 1)
    options = {"attention_mask": torch.ones_like(tokens), "max_length": max_length, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), llama.generate(tokens, **options))


def test_autocast_is_refused(llama: Any, generator: Generator) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InputError, match=r"generate: torch\.autocast is on"):
            generator.generate(prompt(1, 5)[0], max_new_tokens=4)
        with pytest.raises(InputError, match=r"rewrite_for_generation: torch\.autocast is on"):
            rewrite_for_generation(llama, max_length=16)


def test_the_kind_of_cache_that_a_checkpoint_asks_for_is_not_needed() -> None:
    model = make()
    model.generation_config.update(cache_implementation="static", max_new_tokens=5)
    generator = rewrite_for_generation(model, batch_size=2, max_length=24, prompt_lengths=8, config=CONFIG)
    tokens, mask = prompt(2, 6)
    assert torch.equal(
        generator.generate(tokens, attention_mask=mask), model.generate(tokens, attention_mask=mask, do_sample=False)
    )
    assert model.generation_config.cache_implementation == "static"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 0}, "max_length must be an integer of at least 1, not 0"),
        ({"max_length": 16, "batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"max_length": 16, "prompt_lengths": (8, 32)}, r"prompt_lengths must be integers from 1 to max_length=16"),
        ({"max_length": 16, "prompt_lengths": ()}, "prompt_lengths must be integers"),
        ({"max_length": 16, "decode_lengths": (0,)}, "decode_lengths must be integers"),
        ({"max_length": 16, "decode_lengths": "14"}, "decode_lengths must be integers"),
        ({"max_length": None}, "max_length must be an integer of at least 1, not None"),
        ({"max_length": True}, "max_length must be an integer"),
    ],
)
def test_lengths_that_do_not_fit(llama: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rewrite_for_generation(llama, **options)


def test_models_that_do_not_generate(llama: Any) -> None:
    with pytest.raises(InputError, match="that can generate"):
        rewrite_for_generation(torch.nn.Linear(2, 2), max_length=16)
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        rewrite_for_generation(make().train(), max_length=16)


def test_a_model_that_caches_nothing_says_why() -> None:
    config = transformers.BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(CaptureError, match=r"config\.is_decoder is False"):
        rewrite_for_generation(transformers.BertLMHeadModel(config).eval(), max_length=16)


class OnlyOneByOne(transformers.LlamaForCausalLM):
    """Can't be captured with several tokens that follow others, or gives other logits then."""

    def forward(self, input_ids: Any, attention_mask: Any = None, past_key_values: Any = None, **kw: Any) -> Any:
        follows = past_key_values is not None and bool(past_key_values.get_seq_length())
        is_piece = torch.compiler.is_exporting() and follows and input_ids.shape[1] > 1
        if is_piece and not self.config.bos_token_id:
            raise ValueError("a piece")
        result = super().forward(input_ids, attention_mask, past_key_values=past_key_values, **kw)
        if is_piece:
            result.logits = result.logits.flip(-1)
        return result


@pytest.mark.parametrize(
    ("number", "words"), [(0, "could not be captured|fails"), (1, "the generator is not the model")]
)
def test_a_long_prompt_token_by_token_where_no_graph_takes_a_piece(number: int, words: str) -> None:
    model = make()
    model.config.bos_token_id = number
    model.__class__ = OnlyOneByOne
    sentence = f"prompts of more than 8 tokens are processed token by token.*({words})"
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 24, "prompt_lengths": 8}
    with pytest.warns(RewriteWarning, match=sentence) as found:
        generator = rewrite_for_generation(model, config=RewriteConfig(policy="always", verify=False), **sizes)
    assert found[0].filename == __file__
    assert list(generator.graphs) == ["prefill[8]", "decode"]
    tokens, mask = prompt(2, 13)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), model.generate(tokens, **options))


def test_a_long_prompt_of_a_model_that_slices_by_position() -> None:
    config = transformers.MptConfig(vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, use_cache=True)
    torch.manual_seed(0)
    model = transformers.MptForCausalLM(config).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    sizes: dict[str, Any] = {"batch_size": 2, "max_length": 24, "prompt_lengths": 8}
    with warnings.catch_warnings(record=True):
        generator = rewrite_for_generation(model, config=CONFIG, verify=False, **sizes)
    # transformers 4.57 makes the mask of several tokens from a tensor whose size is the number of cached tokens.
    pieces = [] if transformers.__version__.startswith("4.") else ["decode[8]"]
    assert list(generator.graphs) == ["prefill[8]", "decode", *pieces]
    tokens, mask = prompt(2, 13)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), model.generate(tokens, **options))


# The comparison with the model


class CountsInPython(transformers.LlamaForCausalLM):
    """The first logit of each row is the number of cached tokens, as a Python number where the model is not traced."""

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kw: Any,
    ) -> Any:
        result = super().forward(input_ids, attention_mask, position_ids, past_key_values, **kw)
        count = 7 if torch.compiler.is_exporting() or not past_key_values else past_key_values.get_seq_length()
        result.logits = torch.cat([result.logits[..., 1:], torch.full_like(result.logits[..., :1], float(count))], -1)
        return result


def test_a_generator_that_is_not_the_model_is_not_handed_over(llama: Any) -> None:
    model = CountsInPython(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    options: dict[str, Any] = {"max_length": 24, "prompt_lengths": 8, "config": RewriteConfig(verify=False)}
    with pytest.raises(CaptureError, match=r"with a prompt of .* tokens .* the logits of step \d differ by"):
        rewrite_for_generation(model, **options)
    assert isinstance(rewrite_for_generation(model, verify=False, **options), Generator)
