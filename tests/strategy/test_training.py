"""What computes the gradients: said before they are taken, by the function that is asked when they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite import RewriteConfig, RewriteReport, collect_reports, rewrite
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.masks.spec import Band, Chunked, EmptyRows, KeyPadding, MaskSpec
from neuron_attn_rewrite.ops import launch
from neuron_attn_rewrite.ops.arguments import checked_terms
from neuron_attn_rewrite.ops.launch import problem_of_call
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.gradients import OPERATORS, gradients
from tests import stand_ins

LENGTH = 128
CONFIG = RewriteConfig(policy="always", sdk="2.31", verify=False)


class Layer(nn.Module):
    """One attention of bfloat16 with weights before it, its mask made by `mask`."""

    def __init__(self, window: int | None = None, chunk: int | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 192, dtype=torch.bfloat16)
        self.window, self.chunk = window, chunk

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        query, key, value = (t.view(1, length, 4, 16).transpose(1, 2) for t in self.inner(x).chunk(3, -1))
        i, j = torch.arange(length)[:, None], torch.arange(length)
        seen = j <= i
        seen = seen & (i - j < self.window) if self.window else seen
        seen = seen & (i // self.chunk == j // self.chunk) if self.chunk else seen
        return scaled_dot_product_attention(query, key, value, seen, scale=0.25)


def report(layer: Layer, config: RewriteConfig = CONFIG, length: int = LENGTH) -> RewriteReport:
    return rewrite(layer, (torch.randn(1, length, 64).bfloat16(),), config=config).report


def test_a_model_in_training_is_told_its_kernel() -> None:
    found = report(Layer().train())
    (site,) = found.sites
    assert (site.kernel, site.gradients, site.reasons[-1].code) == ("flash_fwd", "attention_bwd", "gradients")
    assert "attention_bwd where SDK 2.31 is installed" in site.reasons[-1]
    assert "gradients by attention_bwd" in found.to_text(color=False) and "gradients by" in found.to_markdown()
    assert RewriteReport.from_json(found.to_json()) == found
    pytest.importorskip("jinja2")
    assert "<dt>gradients by</dt><dd><code>attention_bwd" in found.to_html()


@pytest.mark.parametrize(
    ("layer", "changes", "length", "clause"),
    [
        (Layer(chunk=48), {}, LENGTH, "attention_bwd: the mask must be none, or causal"),
        (Layer(), {}, 100, "attention_bwd: q_len 100 must be a multiple of 128"),
        (Layer(window=9), {"sdk": "2.28"}, LENGTH, "attention_bwd: it comes with SDK 2.29"),
        (Layer(), {"target": "trn1", "kernels": ("attention_isa_kernel",), "sdk": "2.28"}, 640, "of 512, q_len 640"),
    ],
)
def test_the_clause_that_refuses(layer: Layer, changes: dict[str, Any], length: int, clause: str) -> None:
    (site,) = report(layer.train(), replace(CONFIG, **changes), length).sites
    assert (site.gradients, site.reasons[-1].code) == (OPERATORS, "gradients-decomposed")
    assert "computed by plain operators" in site.reasons[-1] and clause in site.reasons[-1]


@pytest.mark.parametrize(
    ("training", "learns", "asked", "told"),
    [
        (True, True, None, True),
        (False, True, None, False),
        (True, False, None, False),
        (True, True, False, False),
        (False, False, True, True),
    ],
)
def test_inference_says_nothing(training: bool, learns: bool, asked: bool | None, told: bool) -> None:
    layer = Layer().train(training).requires_grad_(learns)
    (site,) = report(layer, replace(CONFIG, gradients=asked)).sites
    assert (site.gradients is not None) is told
    assert any(r.code.startswith("gradients") for r in site.reasons) is told


def test_what_stays_native_takes_its_own_gradients() -> None:
    (site,) = report(Layer().train(), RewriteConfig(verify=False)).sites
    assert (site.kernel, site.gradients) == ("native", None)


@pytest.mark.parametrize("grad", [True, False])
def test_a_graph_of_torch_compile_that_takes_gradients(grad: bool) -> None:
    compiled = torch.compile(Layer(), backend="neuron_attn_rewrite", options={"policy": "always", "inner": "eager"})
    with collect_reports() as collected, torch.set_grad_enabled(grad):
        compiled(torch.randn(1, LENGTH, 64).bfloat16())
    (site,) = collected.report.sites
    assert site.gradients == ("attention_bwd" if grad else None)
    torch._dynamo.reset()


def test_a_difference_is_in_the_diff() -> None:
    before, after = report(Layer().train(), replace(CONFIG, sdk="2.28")), report(Layer().train())
    assert "gradients operators -> attention_bwd" in str(before.diff(after))


BOUNDS = torch.tensor([[[0, 9]] * LENGTH])
KNOWN = MaskSpec((Band(upper=0),))


@pytest.mark.parametrize(
    ("mask", "options", "changes"),
    [
        (MaskSpec(), {}, {}),
        (KNOWN, {"band_upper": 0}, {}),
        (KNOWN, {"band_upper": 0}, {"dtype": torch.float32}),
        (KNOWN, {"band_upper": 0}, {"head_dim": 192, "v_head_dim": 192}),
        (MaskSpec((Band(-8, 0),)), {"band_upper": 0, "band_lower": -8}, {}),
        (MaskSpec((Band(-8, 8),)), {"band_upper": 8, "band_lower": -8}, {}),
        (MaskSpec((Chunked(16),)), {"bounds": BOUNDS}, {}),
        (KNOWN & MaskSpec((KeyPadding("m"),)), {"band_upper": 0, "key_padding": torch.ones(1, LENGTH).bool()}, {}),
        (KNOWN, {"band_upper": 0, "softcap": 5.0}, {"softcap": 5.0}),
        (KNOWN, {"band_upper": 0, "sink": torch.zeros(4)}, {"sink": True}),
        (MaskSpec(), {"bias": torch.zeros(1, 1, 1, LENGTH)}, {"bias_shape": (1, 1, 1, LENGTH)}),
    ],
)
@pytest.mark.parametrize("target", ["trn1", "trn2"])
@pytest.mark.parametrize("empty_rows", [EmptyRows.NEVER, EmptyRows.ANY])
def test_before_and_when_they_are_taken_the_same_is_said(
    mask: MaskSpec,
    options: dict[str, Any],
    changes: dict[str, Any],
    target: str,
    empty_rows: EmptyRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 4, "q_len": LENGTH, "kv_len": LENGTH, "scale": 0.3}
    described = AttentionProblem(
        **{**sizes, "head_dim": 16, "v_head_dim": 16, "dtype": torch.bfloat16, "mask": mask, **changes},
        empty_rows=empty_rows,
    )
    query, key, value = torch.zeros(3, 1, 4, LENGTH, described.head_dim, dtype=described.dtype)
    terms = checked_terms(query, key, value, scale=0.3, **options)
    kernels = stand_ins.install(monkeypatch)
    monkeypatch.setenv(launch.PLATFORM, target)
    before = gradients(described, target, 1)[0]
    assert before == gradients(problem_of_call(query, key, value, terms), target, 1)[0]
    assert (launch.backward(query, query, key, value, terms, 1) is None) is (before == OPERATORS)
    assert [name for name in vendor.BACKWARD if kernels[name].calls] == ([before] if before != OPERATORS else [])
