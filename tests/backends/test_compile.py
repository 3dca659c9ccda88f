"""torch.compile: every graph rewritten, inference and training, and what the inner backend gets."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, RewriteError, RewriteWarning, collect_reports, explain
from neuron_attn_rewrite.backends import compile as door
from neuron_attn_rewrite.backends.compile import CompileReport
from neuron_attn_rewrite.backends.inductor import InductorPass, pass_id
from tests.helpers import relative_error
from tests.models import FAMILIES, VOCABULARY

NAME = "neuron_attn_rewrite"
FLASH = torch.ops.neuron_attn.flash_fwd.default


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with contextlib.suppress(ImportError):
        import torch_xla  # type: ignore[import-not-found]  # noqa: F401  Dynamo imports it in between; it sets this option
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, breaks: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.breaks, self.causal = breaks, causal

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, 4, 8).transpose(1, 2) for t in (3 * self.qkv(x)).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        shown = None if mask is None else mask[:, None, None].bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, is_causal=self.causal)
        return x + y.transpose(1, 2).reshape(b, n, 32)


class Stack(nn.Module):
    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**options) for _ in range(layers))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, attention_mask)
        return x


def example(length: int = 10) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return torch.randn(2, length, 32), mask


def compiled(model: nn.Module, inner: Any = "aot_eager", **options: Any) -> Any:
    keywords = {k: options.pop(k) for k in ("dynamic", "fullgraph") if k in options}
    return torch.compile(model, backend=NAME, options={"inner": inner, "policy": "always", **options}, **keywords)


def run(model: nn.Module, function: Any, inputs: tuple[Any, ...]) -> CompileReport:
    """Call the compiled model, compare with the model, and give the reports."""
    with torch.no_grad(), collect_reports() as reports:
        assert relative_error(function(*inputs), model(*inputs)) < 2e-5
    return reports


def counts(reports: CompileReport) -> tuple[int, int]:
    return len(reports.report.replaced), len(reports.report.sites)


class ByModule(nn.Module):
    """Its graph holds no softmax by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT * 0.25
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weights / weights.sum(-1, keepdim=True) @ x


@pytest.mark.parametrize("model", [ByModule(), ByHand()])
def test_no_softmax_by_name(model: nn.Module) -> None:
    model.train()  # in eval mode the module takes its fused path
    assert counts(run(model, compiled(model), (torch.randn(2, 10, 32),))) == (1, 1)


class Keeps:
    """An inner backend that shows what it got."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        self.graphs.append(module)
        self.options = options
        return module.forward

    def targets(self) -> list[Any]:
        return [node.target for graph in self.graphs for node in graph.graph.nodes]


@pytest.mark.parametrize(("name", "implementation"), [("llama", "sdpa"), ("gpt2", "eager"), ("bert", "sdpa")])
def test_models(name: str, implementation: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model = family.build(implementation)
    function = compiled(model, "eager", fullgraph=True)
    with torch.no_grad(), collect_reports() as reports:
        for padding in ("right", "left"):
            call = family.call(padding)
            old, new = model(**call), function(**call)
            assert relative_error(new[0], old[0]) < 2e-5
    assert counts(reports) == (family.attentions, family.attentions), str(reports)
    assert len(reports.graphs) == 1 and reports.graphs[0].calls == 2
    if name != "gpt2":  # transformers 4 keeps its causal mask in a buffer, which is an input here
        assert all("key_padding(attention_mask)" in str(site.mask) for site in reports.report.sites)


def test_the_masks_of_layers_and_their_names() -> None:
    reports = run(model := Stack(causal=False).eval(), compiled(model), example())
    assert [str(site.mask) for site in reports.report.sites] == ["key_padding(attention_mask)"] * 2
    assert [site.name for site in reports.report.sites] == ["layers.0", "layers.1"]
    assert all(site.max_error is not None and site.max_error < 2e-5 for site in reports.report.sites)


@pytest.mark.parametrize(("implementation", "inner"), [("sdpa", "aot_eager"), ("eager", "eager")])
def test_training(implementation: str, inner: str) -> None:
    family = next(f for f in FAMILIES if f.name == "llama")
    model, call = family.build(implementation).train(), family.call("right")
    loss, old = _step(model, model, call)
    with collect_reports() as reports:
        new_loss, new = _step(model, compiled(model, inner), call)
    assert counts(reports) == (2, 2)
    assert relative_error(new_loss, loss) < 1e-5
    assert old.keys() == new.keys()
    assert all(relative_error(new[name], old[name]) < 1e-4 for name in old)


def _step(model: nn.Module, function: Any, call: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = function(**call).logits.float().square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_under_autocast_and_checkpoint() -> None:
    family = next(f for f in FAMILIES if f.name == "llama")
    model, call = family.build("sdpa").train(), family.call("right")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        old = _step(model, model, call)[1]
        with collect_reports() as reports:
            new = _step(model, compiled(model), call)[1]
    assert counts(reports) == (2, 2)
    assert {site.dtype for site in reports.report.sites} == {torch.bfloat16}
    largest = max(float(g.abs().max()) for g in old.values())
    assert all((new[n] - old[n]).abs().max() < 0.02 * largest for n in old)

    torch._dynamo.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    old = _step(model, model, call)[1]
    with collect_reports() as reports:
        new = _step(model, compiled(model), call)[1]
    assert counts(reports) == (2, 2)
    assert all(relative_error(new[name], old[name]) < 1e-4 for name in old)


def test_active_dropout_stays_native() -> None:
    class Dropped(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    inner = Keeps()
    with collect_reports() as reports:
        compiled(Dropped(), inner)(torch.randn(1, 2, 8, 4))
    assert counts(reports) == (0, 1) and reports.report.kept[0].reasons[-1].code == "dropout-active"
    assert F.scaled_dot_product_attention in inner.targets()


def test_a_graph_without_a_replacement_goes_on_as_it_came() -> None:
    """The SDK's rules keep short sequences native."""
    inner = Keeps()
    model = Stack().eval()
    function = torch.compile(model, backend=NAME, options={"inner": inner})
    assert counts(run(model, function, example())) == (0, 2)
    assert F.scaled_dot_product_attention in inner.targets() and FLASH not in inner.targets()


def test_graph_breaks_give_one_report() -> None:
    model = Stack(layers=3, breaks=True).eval()
    reports = run(model, compiled(model, dynamic=False), example())
    assert len(reports.graphs) > 1
    replaced, found = counts(reports)
    assert replaced == found >= 1
    assert sum(graph.calls for graph in reports.graphs if graph.report.sites) == 3
    assert "compiled by aot_eager" in str(reports)


def test_sizes_read_from_data_beside_the_attention() -> None:
    """A mixture of experts splits its tokens by `tolist`: those sizes are symbols, and the attention's are not."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.experts = Layer(causal=True), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.attention(x, None)
            chosen = y[0, :, :1] > torch.zeros(2)
            parts = y[0].split((chosen == torch.tensor([True, False])).sum(0).tolist())
            return torch.cat([self.experts(part) for part in parts])

    model = Experts().eval()
    reports = run(model, compiled(model, "eager", dynamic=False), example()[:1])
    assert counts(reports) == (1, 1), str(reports)


def test_recompiles() -> None:
    model = Stack().eval()
    function = compiled(model, dynamic=False)
    with torch.no_grad(), collect_reports() as reports:
        for length in (10, 12, 10):
            x = example(length)
            assert relative_error(function(*x), model(*x)) < 2e-5
    assert [graph.calls for graph in reports.graphs] == [2, 1]
    assert {site.q_len for site in reports.report.sites} == {10, 12}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_sizes_that_become_symbols(name: str, implementation: str) -> None:
    """Dynamo makes the length a symbol, then the batch: every graph is rewritten."""
    family = next(f for f in FAMILIES if f.name == name)
    model = family.build(implementation)
    function = compiled(model, "eager")
    with torch.no_grad(), collect_reports() as reports:
        for batch, length in ((2, 12), (2, 20), (3, 7), (4, 30)):
            left = torch.ones(batch, length, dtype=torch.int64)
            left[0, : length // 2] = 0
            for mask in (left, left.flip(1)):
                call = {"input_ids": torch.randint(3, VOCABULARY, (batch, length)), "attention_mask": mask}
                old, new = model(**call)[0], function(**call)[0]
                assert relative_error(new[mask.bool()], old[mask.bool()]) < 2e-5
    assert [graph.calls for graph in reports.graphs] == [2, 2, 4]
    assert counts(reports) == (6, 6), str(reports)
    assert all(site.max_error is not None and site.max_error < 2e-5 for site in reports.report.sites)
    assert all("key_padding" in str(site.mask) for site in reports.report.sites)


def test_a_size_that_is_an_input_itself() -> None:
    """How many keys are read is a number that the caller gives, and a symbol from the second call on."""

    class Filled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, filled: int) -> Tensor:
            k = k[:, :, :filled]
            shown = torch.arange(filled) <= filled - q.shape[2] + torch.arange(q.shape[2])[:, None]
            return F.scaled_dot_product_attention(q, k, k, attn_mask=shown)

    model = Filled()
    function = compiled(model, "eager")
    q, k = 3 * torch.randn(1, 2, 4, 8), 3 * torch.randn(1, 2, 24, 8)
    with torch.no_grad(), collect_reports() as reports:
        for filled in (8, 11, 19):
            assert relative_error(function(q, k, filled), model(q, k, filled)) < 2e-5
    assert len(reports.graphs) == 2 and counts(reports) == (2, 2), str(reports)


def test_symbols_from_the_first_call_in_training() -> None:
    model = Stack().train()
    function = compiled(model, dynamic=True)
    with collect_reports() as reports:
        for length in (10, 14):
            x, mask = example(length)
            gradients = []
            for call in (model, function):
                model.zero_grad()
                call(x, mask).square().mean().backward()
                gradients.append(model.layers[0].qkv.weight.grad.clone())  # type: ignore[union-attr, operator]
            assert relative_error(*gradients) < 1e-4
    assert len(reports.graphs) == 1 and counts(reports) == (2, 2), str(reports)


def test_a_mask_that_holds_at_one_length_only_is_no_rule_at_symbols() -> None:
    """Causal at 8 and at no other length."""

    class Odd(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            i = torch.arange(q.shape[2], device=q.device)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=i[:, None] * 8 >= i[None] * q.shape[2])

    model, inner = Odd(), Keeps()
    function = compiled(model, inner)
    with collect_reports() as reports:
        for length in (8, 11, 5):
            q = 3 * torch.randn(1, 2, length, 4)
            assert relative_error(function(q), model(q)) < 2e-5
    static, symbolic = (graph.report.sites[0] for graph in reports.graphs)
    assert str(static.mask) == "causal(offset=0)"
    assert "causal" not in str(symbolic.mask) and symbolic.reasons


def test_buffers_are_inputs_and_not_constants() -> None:
    """One compiled graph serves two modules: a mask in a buffer is not the mask of the first."""

    class Buffered(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask)

    causal = torch.ones(8, 8).tril().bool()
    first, second = Buffered(causal), Buffered(causal.T.contiguous())
    q = 3 * torch.randn(1, 2, 8, 4)

    @torch.compile(backend=NAME, options={"inner": "eager", "policy": "always"})
    def call(module: nn.Module, q: Tensor) -> Tensor:
        return module(q)

    for module in (first, second):
        assert relative_error(call(module, q), module(q)) < 2e-5


class Learned(nn.Module):
    """Attention with a bias that is a product with a parameter, and a sink that is one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.sink = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = F.relu(F.layer_norm(x, (8,)) @ self.weight)
        scores = (x @ x.mT + bias).masked_fill(~mask, -torch.inf)
        return torch.softmax(torch.cat([scores, self.sink[:, None, None].expand(2, 2, 16, 1)], -1), -1)[..., :-1] @ x


def test_parameters_are_learned_although_they_are_inputs() -> None:
    torch.manual_seed(0)
    model, mask = Learned(), torch.ones(16, dtype=torch.bool)
    compiled = torch.compile(model, backend="neuron_attn_rewrite", options={"policy": "always"})
    with collect_reports() as reports:
        compiled(torch.randn(2, 2, 16, 8), mask)
    (site,) = reports.report.sites
    assert site.kernel == "flash_fwd" and str(site.mask) == "key_padding(mask)", str(reports.report)
    x = torch.randn(2, 2, 16, 8)
    for seen in (torch.zeros_like(mask), torch.rand(16) < 0.5):
        assert relative_error(compiled(x, seen), model(x, seen)) < 2e-5


def test_inputs_that_are_written_and_random_numbers_stay_as_they_were() -> None:
    class Cached(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache[:, :, :4] += x
            return F.scaled_dot_product_attention(x, cache, cache) + torch.rand(1)

    x, cache = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 8)
    caches = cache.clone(), cache.clone()
    function = compiled(Cached(), "eager")
    torch.manual_seed(1)
    old = Cached()(x, caches[0])
    torch.manual_seed(1)
    with collect_reports() as reports:
        new = function(x, caches[1])
    assert counts(reports) == (1, 1)
    assert torch.equal(*caches)
    assert relative_error(new, old) < 2e-5


def test_intervals_are_a_constant_of_the_graph() -> None:
    class Blocks(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            i = torch.arange(12, device=q.device) // 5
            return F.scaled_dot_product_attention(q, q, q, attn_mask=i[:, None] >= i[None])

    q = 3 * torch.randn(1, 2, 12, 8)
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        reports = run(model := Blocks(), compiled(model, inner), (q,))
        assert counts(reports) == (1, 1) and "intervals" in str(reports.report.sites[0].mask)


def test_two_configurations_do_not_share_a_graph() -> None:
    model = Stack().eval()
    for target, kernels in (("trn2", "SHARDED_KERNEL"), ("trn1", "UNSHARDED_KERNEL")):
        inner = Keeps()
        run(model, compiled(model, inner, target=target), example())
        strategies = {n.kwargs["strategy"] for g in inner.graphs for n in g.graph.nodes if n.target is FLASH}
        assert strategies == {kernels}


def test_pass_ids() -> None:
    always = RewriteConfig(policy="always")
    assert pass_id(always) == pass_id(RewriteConfig(policy="always"))
    assert len({pass_id(c) for c in (always, RewriteConfig(), RewriteConfig(tolerances={torch.float32: 1e-3}))}) == 3


def test_the_hook_of_inductor() -> None:
    """Called as Inductor does, on the torch-level graph; the placeholders stay the very nodes."""
    seen: list[Any] = []

    def hooked(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        before = module.graph.find_nodes(op="placeholder")
        InductorPass(RewriteConfig(policy="always"))(module.graph)
        module.recompile()
        seen.extend(node.target for node in module.graph.nodes)
        assert all(a is b for a, b in zip(before, module.graph.find_nodes(op="placeholder"), strict=True))
        return module.forward

    reports = run(model := Stack().eval(), torch.compile(model, backend=hooked), example())
    assert counts(reports) == (2, 2) and seen.count(FLASH) == 2
    assert reports.graphs[0].inner == "inductor"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "inductr"}, "inner='inductr' is no backend of torch.compile: choose one of .*eager"),
        ({"inner": NAME}, "would call itself forever"),
        ({"inner": "neuron"}, "inner='neuron' needs TorchNeuron"),
        ({"polcy": "always"}, "options has no 'polcy': choose one of inner, inner_options, target"),
        ({"policy": "allways"}, "RewriteConfig.policy='allways' is not possible"),
        ({"require": 3, "policy": "always"}, "require=3, but 2 of 2 attentions were replaced"),
        ({"require": "all"}, r"require='all', but 0 of 2 attentions were replaced.\n  layers.0: "),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(Stack().eval(), backend=NAME, options=options)(*example())


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_is_installed", lambda package: False)
    with pytest.raises(Exception, match=r"inner='openxla' needs torch-xla: pip install torch-xla"):
        compiled(Stack().eval(), "openxla")(*example())


def test_require_is_met_and_mode_and_options_reach_the_inner_backend() -> None:
    inner = Keeps()
    run(model := Stack().eval(), compiled(model, inner, require=2, inner_options={"a": 1}), example())
    assert inner.options == {"options": {"a": 1}}


def test_the_inner_backend_that_is_taken_by_default(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack().eval()
    with caplog.at_level(logging.INFO, logger="neuron_attn_rewrite"):
        reports = run(model, torch.compile(model, backend=NAME), example())
    assert reports.graphs[0].inner == "eager"
    assert "0 of 2 attentions replaced" in caplog.text


def test_a_defect_of_the_analysis_does_not_stop_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(door, "rewrite_graph", fails)
    model = Stack().eval()
    with pytest.warns(
        RewriteWarning, match="the analysis failed, and the graph is passed on unchanged: ZeroDivisionError"
    ):
        reports = run(model, compiled(model), example())
    assert counts(reports) == (0, 2)


def test_explain_changes_nothing() -> None:
    model = Stack().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = explain(model, *example(), config=RewriteConfig(policy="always", require=7))
    assert len(report.replaced) == len(report.sites) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "report")
    x, mask = example()
    again = explain(torch.compile(model), x, attention_mask=mask, config=RewriteConfig(policy="always"))
    assert again.sites == report.sites


def test_explain_goes_graph_by_graph_where_there_is_no_single_one() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(x, x, x)
            if x.sum().item() > 1e9:
                x = -x
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    report = explain(Branches(), 3 * torch.randn(1, 2, 8, 4), config=RewriteConfig(policy="always"))
    assert [str(site.mask) for site in report.sites] == ["none", "causal(offset=0)"]
    assert len(report.replaced) == 2


def test_no_reports() -> None:
    with collect_reports() as reports, pytest.raises(RewriteError, match="no graph was compiled"):
        _ = reports.report


def test_the_entry_point() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points.torch_dynamo_backends]\nneuron_attn_rewrite = "neuron_attn_rewrite.backends' in text
    assert NAME in torch._dynamo.list_backends()


def without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        w = torch.softmax(q @ k.mT, -1)
    return w @ v


def beside_no_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = v.transpose(1, 2).transpose(1, 2)
    with torch.no_grad():
        turn = torch.cos(torch.arange(float(q.shape[2])))[:, None]
    return torch.softmax((q * turn) @ k.mT, -1) @ values


@pytest.mark.parametrize(("attention", "replaced"), [(without_gradient, 0), (beside_no_gradient, 1)])
def test_a_region_without_gradients(attention: Any, replaced: int) -> None:
    torch._dynamo.reset()
    given = [[torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3)]]
    given.append([t.detach().clone().requires_grad_() for t in given[0]])
    with collect_reports() as reports:
        options = {"policy": "always", "verify": False}
        compiled = torch.compile(attention, backend="neuron_attn_rewrite", options=options)
        for run, tensors in zip((attention, compiled), given, strict=True):
            run(*tensors).square().sum().backward()
    assert [len(graph.report.replaced) for graph in reports.graphs] == [replaced]
    for old, new in zip(*given, strict=True):
        assert (old.grad is None) == (new.grad is None)
        if old.grad is not None and new.grad is not None:
            assert torch.allclose(old.grad, new.grad, rtol=1e-3, atol=1e-4)


MODS: dict[str, tuple[Any, Any, str]] = {
    "causal": (lambda b, h, q, k: q >= k, None, "causal(offset=0)"),
    "a window": (lambda b, h, q, k: (q >= k) & (q - k < 16), None, "sliding_window(16)"),
    "a bias": (lambda b, h, q, k: q >= k, lambda s, b, h, q, k: s + (q - k) * 0.125, "causal(offset=0)"),
    "every second key": (lambda b, h, q, k: (q - k) % 2 == 0, None, "none"),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", MODS)
def test_flex_attention_with_a_block_mask(name: str) -> None:
    """torch.vmap evaluates the mask for all indices, and block masks are inputs of the graph."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_mod, score_mod, mask = MODS[name]
    block = create_block_mask(mask_mod, None, None, 128, 128, device="cpu")

    class Flex(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flex_attention(q, k, v, score_mod=score_mod, block_mask=block)
            assert isinstance(result, Tensor)
            return result

    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 4, 128, 16).mul(2).unbind(0)
    function = compiled(Flex(), "eager")
    with collect_reports() as reports:
        new = function(*qkv)
    assert relative_error(new, Flex()(*qkv)) < 2e-5
    assert [str(site.mask) for site in reports.report.replaced] == [mask], str(reports)


def test_each_worker_has_a_cache_directory_of_its_own() -> None:
    """In another process with the tests' configuration, even if one is set already."""
    script = (
        "import os, torch._inductor.runtime.cache_dir_utils as c; from tests import conftest; import types, pytest\n"
    )
    script += "config = types.SimpleNamespace(stash=pytest.Stash()); conftest.pytest_configure(config)\n"
    script += "print(c.cache_dir(), os.path.isdir(c.cache_dir())); conftest.pytest_unconfigure(config)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    path, existed = done.stdout.split()
    assert path != os.environ["TORCHINDUCTOR_CACHE_DIR"] and existed == "True" and not Path(path).exists()
