"""The graphs of a generator for torch_neuronx.trace: plain inputs and outputs, the cache as aliased buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite import Generator, InputError, RewriteConfig, RewrittenModule, rewrite_for_generation
from tests.backends.test_trace import in_process, needs_xla
from tests.generation.models import make
from tests.helpers import kernel_calls
from tests.models import VOCABULARY

BATCH, PROMPT, NEW = 2, 8, 5


@pytest.fixture(scope="module")
def llama() -> Any:
    return make()


@pytest.fixture(scope="module")
def generator(llama: Any) -> Generator:
    config = RewriteConfig(policy="always", verify=False)
    lengths: dict[str, Any] = {"max_length": 16, "prompt_lengths": PROMPT, "decode_lengths": (1, 4)}
    return rewrite_for_generation(llama, batch_size=BATCH, config=config, verify=False, **lengths)


def test_inputs_and_outputs_are_plain(generator: Generator) -> None:
    for name, graph in generator.graphs.items():
        module, inputs, aliases = generator.for_trace(name)
        assert isinstance(module, RewrittenModule) and module.report is graph.report
        assert len(kernel_calls(module)) == len(kernel_calls(graph)) == 2
        assert inputs[0].shape == (2,), "a number would become a constant"
        held = {id(buffer): buffer for buffer in module.buffers()}
        assert list(aliases.values()) == [1, 2, 3, 4]
        assert all(id(tensor) in held for tensor in aliases)
        before = [tensor.clone() for tensor in aliases]
        with torch.no_grad():
            outputs = module(*inputs)
            traced = torch.jit.trace(module, inputs, strict=False, check_trace=False)(*inputs)
        assert isinstance(outputs, tuple) and len(outputs) == 5
        for (tensor, place), value in zip(aliases.items(), before, strict=True):
            assert (outputs[place].shape, outputs[place].dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(tensor, value), "a call leaves the buffers"
            assert not torch.equal(outputs[place], value)
        assert all(map(torch.equal, traced, outputs))


def test_attentions_share_their_bounds(generator: Generator) -> None:
    """In a step of one token they are computed once, and not for each layer."""
    calls = kernel_calls(generator.graphs["decode"])
    assert len({call.kwargs["bounds"] for call in calls}) == 1 < len(calls)


def test_a_loop_with_the_aliases(llama: Any, generator: Generator) -> None:
    """What a device does with the aliases, done by hand, gives the tokens of the model."""
    tokens = torch.randint(1, VOCABULARY, (BATCH, PROMPT))
    mask = (torch.arange(PROMPT) >= torch.tensor([[0], [3]])).long()
    expected = llama.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    prefill, step = generator.for_trace("prefill[8]"), generator.for_trace("decode")
    capacity = next(iter(step.aliases)).shape[2]

    def call(traced: Any, start: int, *inputs: Tensor) -> Tensor:
        outputs = traced.module(torch.tensor([start, inputs[0].shape[1]]), *inputs)
        for tensor, place in traced.aliases.items():
            tensor.copy_(outputs[place])
        return outputs[0][:, -1:].argmax(-1)

    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = [call(prefill, 0, tokens, mask, positions, torch.tensor([PROMPT - 1]))]
        for start in range(PROMPT, PROMPT + NEW - 1):
            mask = torch.cat([mask, torch.ones(BATCH, 1, dtype=torch.int64)], 1)
            shown = torch.nn.functional.pad(mask, (0, capacity - mask.shape[1]))
            found.append(call(step, start, found[-1], shown, mask.sum(1, keepdim=True) - 1))
    assert torch.equal(torch.cat(found, 1), expected[:, PROMPT:])


def test_the_generator_stays_as_it_is(llama: Any, generator: Generator) -> None:
    generator.for_trace("decode")
    tokens = torch.randint(1, VOCABULARY, (BATCH, 5))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(generator.generate(tokens, **options), llama.generate(tokens, **options))


def test_an_unknown_graph(generator: Generator) -> None:
    with pytest.raises(InputError, match=r"no graph 'decode\[2\]'. There are prefill\[8\], decode"):
        generator.for_trace("decode[2]")


@needs_xla
def test_graphs_lower() -> None:
    """Every input is read, nothing is a constant, and the caches are outputs of their shapes."""
    for name, seen in in_process("generation").items():
        assert seen["problems"] == [], (name, seen)
        assert seen["kernels"] == 2, (name, seen)
        assert seen["max_error"] < 1e-5, (name, seen)
        assert len(seen["caches"]) == 4, (name, seen)
        assert seen["outputs"][1:] == seen["caches"], (name, seen)
