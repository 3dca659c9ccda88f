"""Compares a generator with the model that it was made from, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuron_attn_rewrite.capture.compare import HALF, LARGEST_ERROR, LARGEST_ERROR_OF_HALF, relative_difference
from neuron_attn_rewrite.errors import CaptureError
from neuron_attn_rewrite.generation.generator import Generator
from neuron_attn_rewrite.generation.tokens import random_tokens

STEPS = 5
"""How many tokens are generated: one by the prompt's graph, four by the decode graph."""
SEED = 5


def compare(model: Any, generator: Generator, examples: Sequence[Mapping[str, Any]] = ()) -> None:
    """Let both generate the same tokens, and compare the logits of each step.

    For each graph of a prompt there is a prompt with padding on the left, and one without.
    The examples are compared too.

    Raises:
        CaptureError: the model can't generate, or the logits differ by more than rounding can explain.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for example in examples if generator._encoder is None else ():
            if example["input_ids"].shape[1] + STEPS <= generator.max_length:
                _compare_one(model, generator, example, "an example")
        for length in _prompts(generator):
            if generator._encoder is not None:
                for name, inputs in generator._encoder.examples.items():
                    decoder = {generator._part.prompt: random_tokens(model, generator.batch_size, length)}
                    _compare_one(model, generator, inputs | decoder, f"{length} tokens of the decoder and {name}")
                continue
            for padded in (True, False):
                words = f"a prompt of {length} tokens {'and' if padded else 'without'} padding on the left"
                _compare_one(model, generator, _prompt(model, generator.batch_size, length, padded), words)


def _prompts(generator: Generator) -> list[int]:
    """A length for each graph of a prompt, and one for prompts in pieces."""
    most = generator.max_length - STEPS
    *shorter, longest = generator.prompt_lengths
    below = [0, *shorter][-1]
    lengths = {*shorter, (below + longest + 1) // 2, longest + (longest + 1) // 2}
    return sorted({min(n, most) for n in lengths if n > 0}) if most > 0 else []


def _prompt(model: Any, batch: int, length: int, padded: bool) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64, device=model.device)
    if padded:
        padding = torch.arange(batch, device=model.device)[:, None] + int(batch == 1)
        mask = (torch.arange(length, device=model.device) >= (padding * length) // (batch + 1)).long()
    return {"input_ids": random_tokens(model, batch, length), "attention_mask": mask}


def _compare_one(model: Any, generator: Generator, given: Mapping[str, Any], words: str) -> None:
    forced = random_tokens(model, generator.batch_size if generator._encoder else len(given["input_ids"]), STEPS)
    try:
        expected = _logits(model, {}, given, forced)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}.generate fails itself with {words}: {type(error).__name__}: {error}"
        ) from error
    generator._cache.reset()
    found = _logits(generator._model, {generator._names.cache: generator._cache}, given, forced)
    limit = LARGEST_ERROR_OF_HALF if expected[0].dtype in HALF or model.dtype in HALF else LARGEST_ERROR
    for step, (new, old) in enumerate(zip(found, expected, strict=True)):
        distance = relative_difference(old, new)
        if not distance <= limit:
            raise CaptureError(
                f"the generator is not the model: with {words}, the logits of step {step} differ by "
                f"{distance:.1%} of the largest. {REASONS} verify=False skips this comparison."
            )


REASONS = (
    "Most often the model computes positions or a mask from a length that became a constant in the graph, or it keeps "
    "something outside of its cache."
)


def _logits(model: Any, cache: Mapping[str, Any], given: Mapping[str, Any], forced: Tensor) -> tuple[Tensor, ...]:
    """The logits of each step, [batch, vocabulary], if the tokens `forced` are generated."""
    mixin: Any = import_module("transformers").GenerationMixin
    starts: list[int] = []  # generate may put a token before those of the decoder

    def force(tokens: Tensor, scores: Tensor) -> Tensor:
        starts.append(tokens.shape[1])
        wanted = forced[:, tokens.shape[1] - starts[0]]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)

    result = mixin.generate(  # of Whisper and others, `generate` itself gives no logits
        model,
        **cache,
        **given,
        do_sample=False,
        num_beams=1,
        min_new_tokens=STEPS,
        max_new_tokens=STEPS,
        pad_token_id=0,
        use_cache=True,
        logits_processor=[force],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return tuple(result.logits)
