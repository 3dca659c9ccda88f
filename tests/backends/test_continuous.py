"""transformers' continuous batching on `flash_paged`: each request gets the tokens that it gets alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neuron_attn_rewrite import FlashAttentionStrategy, RewriteConfig, RewriteError
from neuron_attn_rewrite.backends import continuous
from neuron_attn_rewrite.backends.continuous import paged_step
from neuron_attn_rewrite.backends.huggingface import Registration, register_with_transformers
from tests.helpers import relative_error

FIRST_FORM = transformers.__version__.startswith("4.")
"""transformers 4.57 can't size its cache on a CPU. The tests give it a size."""
LENGTHS = (3, 40, 17, 100, 5, 33)
NEW_TOKENS = 6
PAGE = 32
RING = "ring of the last 16 tokens"

MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "full": ("llama", {}, ("flash_paged", "flash_paged")),
    "softcap": ("gemma2", {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 2.0}, ("flash_paged",) * 2),
    "softcap and ring": ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 2.0}, ("native", "flash_paged")),
    "ring": ("mistral", {"sliding_window": 16}, ("native", "native")),
    "sinks and ring": ("gpt_oss", {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
                       ("native", "flash_paged")),
}  # fmt: skip
IN_ORDER = [name for name in MODELS if not (FIRST_FORM and "ring" in name)]


def sized(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.generation.continuous_batching import cache, continuous_api

    for module in (cache, continuous_api):
        found = (torch.device("cpu"), 2**32, 0, 0)
        monkeypatch.setattr(module, "get_device_and_memory_breakdown", lambda found=found: found, raising=False)


@pytest.fixture
def registration(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registration]:
    if FIRST_FORM:
        sized(monkeypatch)
    yield register_with_transformers(RewriteConfig())


def build(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = transformers.AutoConfig.for_model(kind, **sizes, num_attention_heads=4, num_key_value_heads=2, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)  # far from uniform weights, so that a wrong key shows
    return model


def greedy() -> transformers.GenerationConfig:
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=199, pad_token_id=0
    )
    if FIRST_FORM:
        settings.num_blocks, settings.max_batch_tokens, settings.block_size = 64, 64, PAGE
    return settings


def served(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    options: dict[str, Any] = {"progress_bar": False}
    if not FIRST_FORM:
        sizes = transformers.ContinuousBatchingConfig(page_size=PAGE, num_blocks=64, max_batch_tokens=64)
        options["continuous_batching_config"] = sizes
    found = model.generate_batch(prompts, generation_config=greedy(), **options)
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.split("_")[1]))]


def prompts() -> list[list[int]]:
    """The last two begin alike, so that transformers may share their blocks."""
    drawn = [torch.randint(1, 199, (n,)).tolist() for n in LENGTHS]
    return [*drawn, drawn[3][:64] + drawn[1]]


def alone(model: Any, prompt: list[int]) -> list[int]:
    tokens: Tensor = model.generate(torch.tensor([prompt]), generation_config=greedy())
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", IN_ORDER)
def test_each_request_gets_what_it_gets_alone(registration: Registration, name: str) -> None:
    """At most 64 tokens in a step: long prompts are cut, and behind their first part meet others that decode."""
    kind, fields, kernels = MODELS[name]
    model, requests = build(kind, **fields), prompts()
    model.set_attn_implementation("neuron_nki")
    found = served(model, requests)
    assert model.config._attn_implementation == "neuron_nki"
    model.set_attn_implementation("eager")
    assert found == [alone(model, prompt) for prompt in requests]
    report = registration.report
    assert tuple(site.kernel for site in sorted(report.sites, key=lambda site: site.name)) == kernels
    for site in report.sites:
        (reason,) = site.reasons
        if site.kernel == "native":
            assert reason.code == "no-kernel-call" and RING in reason
        else:
            assert reason.code == "cache-in-blocks" and [node.name for node in site.after] == ["flash_paged"]


@pytest.mark.parametrize("implementation", ["paged|neuron_nki", "paged|other"])
def test_the_paged_name_is_registered(registration: Registration, implementation: str) -> None:
    other = register_with_transformers(RewriteConfig(), name="other")
    model, requests = build("llama"), prompts()[:3]
    want = [alone(model, prompt) for prompt in requests]
    model.set_attn_implementation(implementation)
    assert served(model, requests) == want
    used, unused = (other, registration) if "other" in implementation else (registration, other)
    assert len(used.report.replaced) == 2 and not unused.report.sites
    assert {"paged|neuron_nki", "paged|other"} <= set(transformers.AttentionInterface())


def test_other_implementations_are_served_as_before(registration: Registration) -> None:
    model, requests = build("llama"), prompts()[:3]
    want = [alone(model, prompt) for prompt in requests]
    model.set_attn_implementation("sdpa_paged" if FIRST_FORM else "sdpa")
    assert served(model, requests) == want and not registration.report.sites


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (RewriteConfig(kernels=("attention_cte",)), "config.kernels leaves it out"),
        (RewriteConfig(sites={"*": FlashAttentionStrategy.NONE}), "NONE is set for this site"),
    ],
    ids=["kernels", "sites"],
)
def test_the_configuration_can_leave_layers_as_they_are(
    registration: Registration, config: RewriteConfig, reason: str
) -> None:
    registration.config = config
    model, requests = build("llama"), prompts()
    want = [alone(model, prompt) for prompt in requests]
    model.set_attn_implementation("neuron_nki")
    assert served(model, requests) == want
    assert len(registration.report.kept) == 2
    assert all(reason in site.reasons[0] for site in registration.report.kept), registration.report.kept


def test_the_schedule_is_made_once_a_step(registration: Registration) -> None:
    model = build(
        "llama",
    )
    model.set_attn_implementation("neuron_nki")
    continuous._schedule.cache_clear()
    served(model, prompts()[:2])
    counts = continuous._schedule.cache_info()
    assert counts.hits == counts.misses > 1  # two layers


def test_a_register_that_is_called_twice_admits_once(registration: Registration) -> None:
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    method = "start" if FIRST_FORM else "switch_to_cb_friendly_attn"
    original = getattr(getattr(ContinuousBatchingManager, method), continuous._HOOKED)
    register_with_transformers(RewriteConfig())
    assert getattr(getattr(ContinuousBatchingManager, method), continuous._HOOKED) is original
    assert not hasattr(original, continuous._HOOKED)


@pytest.mark.parametrize("window", [None, 5])
def test_the_mask_of_a_layer_that_stays_native(window: int | None) -> None:
    """Against the definition. Rows behind the last request are padding."""
    query_lens, context_lens = (3, 1, 4), (6, 4, 0)
    if window is not None:
        context_lens = tuple(min(n, window - 1) for n in context_lens)
    key_lens = [q + c for q, c in zip(query_lens, context_lens, strict=True)]
    ends = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (query_lens, key_lens)]
    step = continuous.PagedStep(None, 0, {}, *ends, torch.empty(0, dtype=torch.long), window, None)
    mask, row, start = step.mask(10, sum(key_lens))[0, 0], 0, 0
    for new, context in zip(query_lens, context_lens, strict=True):
        for i in range(new):
            want = torch.zeros(sum(key_lens), dtype=torch.bool)
            first = 0 if window is None else max(0, context + i + 1 - window)
            want[start + first : start + context + i + 1] = True
            assert torch.equal(mask[row + i], want)
        row, start = row + new, start + new + context


def test_what_lies_in_the_cache_behind_a_request_is_not_read(registration: Registration) -> None:
    """One step by hand: NaN in every slot that no request has written."""
    if FIRST_FORM:
        cache = SimpleNamespace(
            layer_index_to_group_indices={0: (0, 0)}, sliding_windows={0: 1}, block_size=4,
            key_cache=[torch.full((33, 2, 16), torch.nan)], value_cache=[torch.full((33, 2, 16), torch.nan)],
        )  # fmt: skip
        keys, values = (t[0][:-1].view(8, 4, 2, 16) for t in (cache.key_cache, cache.value_cache))
    else:
        keys, values = torch.full((2, 8, 4, 2, 16), torch.nan)
        allocator = SimpleNamespace(
            index=0, layer_type="full_attention", get_cache_for_block_table=lambda _: (keys, values)
        )
        cache = SimpleNamespace(layer_to_allocator={0: allocator}, update=lambda *_: None)
    past = torch.randn(2, 6, 2, 16) * 3
    slots = torch.tensor([20, 21, 22, 23, 4, 5])  # blocks 5 and 1
    for pages, new in ((keys, past[0]), (values, past[1])):
        pages.view(-1, 2, 16)[slots] = new
    query, key, value = (torch.randn(1, heads, 3, 16) * 3 for heads in (4, 2, 2))
    options = {
        "cu_seq_lens_q": torch.tensor([0, 1, 3]).int(),
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, 7, 9]).int()},
        "read_index": [torch.tensor([*slots, 6, 28, 29])],
        "write_index": [torch.tensor([6, 28, 29])],
    }
    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    assert paged_step(module, cache, options).window is None
    attention = transformers.AttentionInterface()["neuron_nki"]
    out, _ = attention(module, query, key, value, None, scaling=0.25, cache=cache, **options)
    for rows, context in ((slice(0, 1), past), (slice(1, 3), past[:, :0])):
        whole = [torch.cat([old.transpose(0, 1), new[0, :, rows]], 1).repeat_interleave(2, 0).double()
                 for old, new in zip(context, (key, value), strict=True)]  # fmt: skip
        scores = query[0, :, rows].double() @ whole[0].mT * 0.25
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + context.shape[1])
        want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ whole[1]
        assert relative_error(out[0, rows].transpose(0, 1), want) < 2e-6
    if FIRST_FORM:
        assert torch.equal(keys.view(-1, 2, 16)[[6, 28, 29]], key[0].transpose(0, 1))


@pytest.mark.parametrize("change", ["dtype", "head_dim"])
def test_a_cache_of_another_form_is_a_reason(change: str) -> None:
    pages = torch.zeros(4, 8, 2, 16, dtype=torch.float16 if change == "dtype" else torch.float32)
    step = continuous.PagedStep(None, 0, {}, *torch.zeros(2, 1).int(), torch.empty(0), None, (pages, pages))
    key = torch.zeros(1, 2, 3, 24 if change == "head_dim" else 16)
    assert "the key is [1, 2, 3" in step.why_not(key, key)


if FIRST_FORM:

    @pytest.mark.parametrize("implementation", ["neuron_nki", "paged|neuron_nki"])
    def test_a_cpu_is_refused(implementation: str) -> None:
        register_with_transformers(RewriteConfig())
        model = build("llama")
        model.set_attn_implementation(implementation)
        with pytest.raises(RewriteError, match="can't size a paged cache on a CPU"):
            served(model, prompts()[:1])

    def test_a_cpu_can_not_be_served_with_any_attention(caplog: pytest.LogCaptureFixture) -> None:
        """The proof: transformers' own attention fails in the same place."""
        model = build("llama")
        model.set_attn_implementation("sdpa_paged")
        with caplog.at_level(logging.ERROR, "ContinuousBatchingLogger"):
            assert served(model, prompts()[:1]) == []
        assert "unsupported operand type(s) for -: 'NoneType' and 'int'" in caplog.text

    def test_a_full_window_is_refused(registration: Registration, caplog: pytest.LogCaptureFixture) -> None:
        model = build("mistral", sliding_window=16)
        short, long = [7, 8, 9], list(range(1, 41))
        want = alone(model, short)
        model.set_attn_implementation("neuron_nki")
        assert served(model, [short]) == [want]
        with caplog.at_level(logging.ERROR, "ContinuousBatchingLogger"):
            assert served(model, [long]) == []
        assert "reads a full window without its newest token" in caplog.text
