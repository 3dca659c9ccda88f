"""Models with an encoder: a generator gives the tokens of `model.generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import CaptureError, Generator, InputError, RewriteConfig, rewrite_for_generation
from tests.generation.models import make

CONFIG = RewriteConfig(policy="always")
BATCH, MAX_LENGTH, LENGTHS, NEW, VOCABULARY = 4, 20, (6, 10), 6, 90
BINS, FRAMES = 16, 48
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    **SPECIAL,
}
POSITIONS = {"max_position_embeddings": 64}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "num_mel_bins": BINS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "T5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}),
    "Bart": ("BartForConditionalGeneration", BART | POSITIONS),
    "Marian": ("MarianMTModel", BART | POSITIONS),
    "Whisper": ("WhisperForConditionalGeneration", BART | WHISPER),
    "Mvp": ("MvpForConditionalGeneration", BART | POSITIONS),
    "T5Gemma": (
        "T5GemmaForConditionalGeneration",
        {"encoder": GEMMA, "decoder": GEMMA, "vocab_size": VOCABULARY, "decoder_start_token_id": 2},
    ),
    "EncoderDecoder": (
        "EncoderDecoderModel",
        {
            "encoder": BERT,
            "decoder": BERT | {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 2,
            "pad_token_id": 0,
        },
    ),
}


def model_of(kind: str) -> Any:
    """A tiny model, its weights large enough that a wrong mask shows."""
    name, fields = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**fields)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=1.5 * weight[0].numel() ** -0.5)
    settings = model.generation_config
    settings.update(eos_token_id=None, forced_eos_token_id=None, forced_bos_token_id=None)
    if kind == "Whisper":
        # Tokens behind this one are times. A segment that ends at time 0 would be processed again, without end.
        settings.no_timestamps_token_id, settings.is_multilingual = VOCABULARY - 1, False
    return model


def features(rows: int, frames: int = FRAMES, bins: int = BINS) -> Tensor:
    return torch.randn(rows, bins, frames, generator=torch.Generator().manual_seed(2))


Pair = tuple[Any, Generator]


@pytest.fixture(scope="module", params=["T5", "Bart", "Marian"])
def reader(request: pytest.FixtureRequest) -> Pair:
    """A model whose encoder takes tokens, and its generator."""
    model = model_of(request.param)
    sizes = {"batch_size": BATCH, "max_length": MAX_LENGTH, "encoder_lengths": LENGTHS}
    return model, rewrite_for_generation(model, config=CONFIG, **sizes)


@pytest.fixture(scope="module")
def whisper() -> Pair:
    model = model_of("Whisper")
    example = {"input_features": features(2)}
    return model, rewrite_for_generation(model, batch_size=BATCH, max_length=MAX_LENGTH, example=example, config=CONFIG)


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def mask_of(padding: str, length: int) -> dict[str, Tensor]:
    mask = torch.ones(2, length, dtype=torch.int64)
    if padding in ("right", "left"):
        mask[1, length // 2 + 1 :] = 0
    return {} if padding == "none" else {"attention_mask": mask.flip(1) if padding == "left" else mask}


DECODER = {"start": {}, "several tokens": {"decoder_input_ids": torch.tensor([[3, 5, 6], [3, 7, 8]])}}


def same(pair: Pair, *args: Any, **options: Any) -> Tensor:
    """The tokens, if both give the same."""
    model, generator = pair
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    expected: Tensor = model.generate(*args, **options)
    assert torch.equal(generator.generate(*args, **options), expected)
    return expected


def test_the_graphs_and_their_reports(reader: Pair, whisper: Pair) -> None:
    _, generator = reader
    assert list(generator.graphs) == ["prefill[1]", "decode", "encoder[6]", "encoder[10]"]
    for report in (*(r for name, r in generator.reports.items() if name != "prefill[1]"),):
        assert report.sites
        assert all(site.is_replaced for site in report.sites)
    assert list(whisper[1].graphs) == ["prefill[1]", "decode", "encoder"]


@pytest.mark.parametrize("length", [3, 6, 9])
@pytest.mark.parametrize("padding", ["none", "full", "right", "left"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("start", DECODER)
def test_tokens_of_a_reader(reader: Pair, length: int, padding: str, beams: int, start: str) -> None:
    same(reader, tokens_of(2, length), num_beams=beams, **mask_of(padding, length), **DECODER[start])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_and_tokens_of_other_dtypes(reader: Pair, dtype: torch.dtype) -> None:
    mask = mask_of("right", 9)["attention_mask"].to(dtype)
    tokens = tokens_of(2, 9)
    assert torch.equal(same(reader, tokens, attention_mask=mask), same(reader, tokens.int(), attention_mask=mask))


@pytest.mark.parametrize("kind", ["Mvp", "T5Gemma", "EncoderDecoder"])
def test_tokens_of_other_models(kind: str) -> None:
    """One asks for the value of a position, one takes `logits_to_keep`, one has two configs."""
    model = model_of(kind)
    generator = rewrite_for_generation(
        model, batch_size=BATCH, max_length=MAX_LENGTH, encoder_lengths=10, config=CONFIG, verify=False
    )
    for padding in ("left", "right"):
        same((model, generator), tokens_of(2, 9), **mask_of(padding, 9))


def test_padding_changes_the_logits(reader: Pair) -> None:
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

    def logits(model: Any, padding: str) -> Tensor:
        result: Tensor = model.generate(tokens_of(2, 9), **options, **mask_of(padding, 9)).logits[0]
        return result

    right, full = (logits(reader[0], padding) for padding in ("right", "full"))
    for padding, expected in (("right", right), ("full", full)):
        torch.testing.assert_close(logits(reader[1], padding), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right[0], full[0])
    assert not torch.allclose(right[1], full[1], rtol=1e-2, atol=1e-2)


def test_padding_that_the_tokens_show(reader: Pair) -> None:
    tokens = tokens_of(2, 9)
    tokens[1, 5:] = reader[0].generation_config.pad_token_id
    same(reader, tokens)


def test_an_input_does_not_depend_on_the_one_before(reader: Pair) -> None:
    first = same(reader, tokens_of(2, 9))
    assert not torch.equal(same(reader, tokens_of(1, 4))[0], first[0])
    assert torch.equal(same(reader, tokens_of(2, 9)), first)


def test_an_output_of_the_encoder_can_be_given(reader: Pair) -> None:
    masks = mask_of("right", 9)
    encoded = reader[0].get_encoder()(tokens_of(2, 9), **masks)
    same(reader, encoder_outputs=encoded, **masks)
    with pytest.raises(InputError, match=r"attention_mask must be \[2, 9\], as encoder_outputs, not \[2, 8\]"):
        reader[1].generate(encoder_outputs=encoded, **mask_of("right", 8))


def test_a_model_that_is_set_to_use_no_cache(reader: Pair) -> None:
    settings = reader[0].generation_config
    config = type(settings).from_dict(settings.to_dict() | {"use_cache": False})
    same(reader, tokens_of(2, 5), generation_config=config)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("start", DECODER)
def test_tokens_of_whisper(whisper: Pair, beams: int, start: str) -> None:
    same(whisper, features(2), num_beams=beams, **DECODER[start])


def test_whisper_fills_up_a_short_input(whisper: Pair) -> None:
    same(whisper, features(2, FRAMES - 2))


def test_a_result_of_whisper_holds_the_cache(whisper: Pair) -> None:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    old, new = (each.generate(features(2), **options) for each in whisper)
    assert torch.equal(new.sequences, old.sequences)
    torch.testing.assert_close(new.scores, old.scores, rtol=1e-4, atol=1e-4)


WRONG: dict[str, tuple[Tensor, dict[str, Any], str]] = {
    "long": (tokens_of(1, 11), {}, r"\[1, 11\].*or shorter ones"),
    "mask": (
        tokens_of(2, 5),
        {"attention_mask": torch.ones(2, 4, dtype=torch.int64)},
        r"attention_mask must be \[2, 5\]",
    ),
    "rows": (tokens_of(5, 5), {}, "5 sequences"),
    "beams": (tokens_of(2, 5), {"num_beams": 3}, "6 sequences"),
    "new tokens": (tokens_of(2, 5), {"max_new_tokens": MAX_LENGTH}, f"max_length={MAX_LENGTH}"),
    "floats": (torch.rand(2, 5), {}, "integers"),
    "no tokens": (tokens_of(2, 0), {}, "at least one token"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_of_a_reader(reader: Pair, what: str) -> None:
    inputs, options, words = WRONG[what]
    _rejects(reader[1], inputs, {"max_new_tokens": NEW, **options}, words)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (features(1, bins=BINS - 1), r"the graphs take .*input_features"),
        (features(BATCH + 1), f"{BATCH + 1} sequences"),
    ],
    ids=["bins", "rows"],
)
def test_wrong_features(whisper: Pair, inputs: Tensor, words: str) -> None:
    _rejects(whisper[1], inputs, {"max_new_tokens": NEW}, words)


def _rejects(generator: Generator, inputs: Tensor, options: dict[str, Any], words: str) -> None:
    before = [tensor.clone() for tensor in generator._state.tensors]
    with pytest.raises(InputError, match=words):
        generator.generate(inputs, **options)
    assert all(torch.equal(*pair) for pair in zip(before, generator._state.tensors, strict=True))


def test_an_encoder_of_features_needs_an_example() -> None:
    with pytest.raises(InputError, match="Give an example with input_features"):
        rewrite_for_generation(model_of("Whisper"), max_length=MAX_LENGTH)


def test_an_example_must_fit_the_encoder() -> None:
    with pytest.raises(CaptureError, match="the encoder of WhisperForConditionalGeneration fails"):
        rewrite_for_generation(
            model_of("Whisper"), max_length=MAX_LENGTH, example={"input_features": features(1, FRAMES - 2)}
        )


def test_lengths_of_an_encoder_need_an_encoder() -> None:
    with pytest.raises(InputError, match="has no encoder"):
        rewrite_for_generation(make(), max_length=MAX_LENGTH, prompt_lengths=1, encoder_lengths=8)


@pytest.mark.parametrize("lengths", [0, (), (4, -1), True])
def test_wrong_lengths_of_an_encoder(lengths: Any) -> None:
    with pytest.raises(InputError, match="encoder_lengths must be integers of at least 1"):
        rewrite_for_generation(model_of("Bart"), max_length=MAX_LENGTH, encoder_lengths=lengths)
