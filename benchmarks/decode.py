"""Time of one step of generation: the rewritten graph beside the exported one and beside eager with a static cache.

A model of Llama's shape with random weights. The exported graph is that of transformers' own wrapper for torch.export,
with a static cache. All three run in turn, so that whatever else the machine does falls on all alike. A ratio above 1
means that the rewritten graph is faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.flash_fwd import duration, print_table
from neuron_attn_rewrite import RewriteConfig, rewrite_for_generation

VOCABULARY = 1000
CAPACITIES = (1024, 4096, 16384)
PARTS = (0.01, 0.5, 1.0)
"""How much of the cache is filled."""


def model_of(layers: int, capacity: int) -> Any:
    """A small model with heads of the usual size, 9 for queries and 3 for keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=capacity, eos_token_id=None, **sizes
    )
    return LlamaForCausalLM(config).eval()


def exported_step(model: Any, batch: int, capacity: int) -> Any:
    """What torch.export gives for a step, by the wrapper of transformers. It takes no padding."""
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": batch, "max_cache_len": capacity}
    inputs = {
        "input_ids": torch.zeros(batch, 1, dtype=torch.int64),
        "cache_position": torch.zeros(1, dtype=torch.int64),
    }
    wrapper = TorchExportableModuleWithStaticCache(model)
    return torch.export.export(wrapper, args=(), kwargs=inputs, strict=False).module()


def steps(model: Any, batch: int, capacity: int) -> dict[str, Callable[[int], Callable[[], Tensor]]]:
    """For each way a function that takes a position, and gives the step that processes the token there."""
    from transformers import StaticCache

    options: dict[str, Any] = {"max_length": capacity, "batch_size": batch, "prompt_lengths": 1, "verify": False}
    quick = rewrite_for_generation(model, config=RewriteConfig(policy="always", verify=False), **options)
    static = StaticCache(config=model.config, max_cache_len=capacity)
    tokens = torch.randint(0, VOCABULARY, (batch, 1))
    model(tokens, past_key_values=static, cache_position=torch.tensor([0]))  # it makes its tensors

    for layer in static.layers:
        layer.keys.normal_()
        layer.values.normal_()
    filled = [tensor for layer in static.layers for tensor in (layer.keys, layer.values)]
    graph, cache = quick.graphs["decode"], [tensor.clone() for tensor in filled]

    def rewritten(position: int) -> Callable[[], Tensor]:
        mask = (torch.arange(capacity) <= position).long().repeat(batch, 1)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": torch.full((batch, 1), position)}
        place = torch.tensor([position, 1])
        return lambda: graph(place, cache, inputs)[0]  # type: ignore[no-any-return]

    alone = exported_step(model, batch, capacity)
    for name, buffer in alone.named_buffers():
        for i, layer in enumerate(static.layers):
            for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                if name.endswith(f"{kind}_cache_{i}"):
                    buffer.copy_(tensor)

    def exported(position: int) -> Callable[[], Tensor]:
        place = torch.tensor([position])
        return lambda: alone(input_ids=tokens, cache_position=place)  # type: ignore[no-any-return]

    def eager(position: int) -> Callable[[], Tensor]:
        mask = torch.ones(batch, position + 1, dtype=torch.int64)
        given = {"attention_mask": mask, "position_ids": torch.full((batch, 1), position)}
        place = torch.tensor([position])

        def step() -> Tensor:
            for layer in static.layers:
                if isinstance(getattr(layer, "cumulative_length", None), Tensor):
                    layer.cumulative_length.fill_(position)
            result: Tensor = model(tokens, past_key_values=static, cache_position=place, **given).logits
            return result

        return step

    return {"rewritten": rewritten, "exported": exported, "eager": eager}


def compare(runs: Sequence[Callable[[], Tensor]], seconds: float) -> list[float]:
    """Median seconds of each, run in turn."""
    first, *others = [run() for run in runs]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-3)
    times: list[list[float]] = [[] for _ in runs]
    spent = 0.0
    while spent < seconds or len(times[0]) < 5:
        for taken, run in zip(times, runs, strict=True):
            taken.append(duration(run))
        spent = sum(map(sum, times))
    return [statistics.median(taken) for taken in times]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capacity", nargs="+", type=int, default=CAPACITIES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row of the table")
    chosen = parser.parse_args(arguments)
    rows = [("cache", "position", "rewritten ms", "exported ms", "eager ms", "exported/rewritten", "eager/rewritten")]
    with torch.no_grad():
        for capacity in chosen.capacity:
            ways = steps(model_of(chosen.layers, capacity), chosen.batch, capacity)
            for position in sorted({min(int(capacity * part), capacity - 1) for part in PARTS}):
                quick, exported, eager = compare([way(position) for way in ways.values()], chosen.seconds)
                numbers = (f"{t * 1e3:.1f}" for t in (quick, exported, eager))
                ratios = f"{exported / quick:.2f}", f"{eager / quick:.2f}"
                rows.append((str(capacity), str(position), *numbers, *ratios))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print_table(rows)


if __name__ == "__main__":
    main()
