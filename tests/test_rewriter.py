"""The front door: what goes in, what comes out, and what is left untouched."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from neuron_attn_rewrite import (
    CaptureError,
    ConfigError,
    FlashAttentionStrategy,
    InputError,
    RewriteConfig,
    RewriteError,
    RewriteWarning,
    explain,
    rewrite,
)
from neuron_attn_rewrite.replace.verify import compare
from tests.helpers import ALWAYS, kernel_calls, relative_error


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.unused = nn.Linear(2, 2)
        self.dropout = dropout

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, *, double: bool = False) -> dict[str, Tensor]:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = self.out(y.transpose(1, 2).reshape(b, s, 32))
        return {"y": y * 2 if double else y}


def example() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 7:] = 0
    return torch.randn(2, 10, 32), mask


@pytest.fixture
def model() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


def test_called_by_position_and_by_name(model: Attention) -> None:
    x, mask = example()
    for args, kwargs in (((x, mask), {}), ((x,), {"attention_mask": mask}), ((), {"attention_mask": mask, "x": x})):
        rewritten = rewrite(model, args, kwargs, config=ALWAYS)
        assert len(rewritten.report.replaced) == 1
        expected = model(x, mask)
        for call in (
            lambda: rewritten(x, mask),  # noqa: B023
            lambda: rewritten(x, attention_mask=mask),  # noqa: B023
            lambda: rewritten(attention_mask=mask, x=x),  # noqa: B023
        ):
            got = call()
            assert list(got) == ["y"]
            assert relative_error(got["y"], expected["y"]) < 2e-5


def test_plain_values_are_fixed_at_capture(model: Attention) -> None:
    x, mask = example()
    rewritten = rewrite(model, (x, mask), {"double": True}, config=ALWAYS)
    assert relative_error(rewritten(x, mask, double=True)["y"], model(x, mask, double=True)["y"]) < 2e-5
    with pytest.raises(InputError, match="'double' is False, but was captured as True"):
        rewritten(x, mask, double=False)
    with pytest.raises(InputError, match="'double' is missing: its default is False, but was captured as True"):
        rewritten(x, mask)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (torch.randn(2, 11, 32), example()[1]),
            {},
            r"'x' is float32\[2, 11, 32\], but was captured as float32\[2, 10",
        ),
        ((torch.randn(2, 10, 32).double(), example()[1]), {}, r"'x' is float64"),
        ((example()[0],), {}, "'attention_mask' is missing"),
        (example(), {"x": example()[0]}, "given twice"),
        (example(), {"labels": example()[1]}, "'labels' was not captured"),
        ((*example(), example()[1]), {}, "3 positional arguments"),
    ],
)
def test_wrong_calls_of_the_result(model: Attention, args: Any, kwargs: Any, message: str) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    with pytest.raises(InputError, match=message):
        rewritten(*args, **kwargs)


def test_an_argument_that_is_none_may_be_named(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    rewritten(*example(), labels=None)


def test_the_model_is_untouched(model: Attention) -> None:
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    modules, mode = dict(model.named_modules()), model.training
    rewritten = rewrite(model, example(), config=ALWAYS)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: b[0] for name, b in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert dict(model.named_modules()) == modules and model.training == mode == rewritten.training
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in rewritten.parameters()} == shared


def test_state_dict_goes_both_ways(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    assert rewritten.state_dict().keys() == model.state_dict().keys()
    other = Attention().eval()
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    x, mask = example()
    expected = other(x, mask)["y"]
    rewritten.load_state_dict(torch.load(file))
    assert relative_error(rewritten(x, mask)["y"], expected) < 2e-5


class Masked(nn.Module):
    """Its mask and scale are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shown", torch.ones(6, 6, dtype=torch.bool).tril())
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.offset
        scores = (x @ x.mT * self.scale).masked_fill(~self.shown, -torch.inf)
        return torch.softmax(scores, -1) @ x


def test_another_value_of_what_was_proven_is_not_loaded() -> None:
    model, x = Masked(), torch.randn(1, 2, 6, 4)
    rewritten = rewrite(model, (x,), config=ALWAYS)
    assert str(rewritten.report.sites[0].mask) == "causal(offset=0)"
    other = Masked()
    other.offset += 1
    rewritten.load_state_dict(other.state_dict())
    assert relative_error(rewritten(x), other(x)) < 2e-5
    for name in ("shown", "scale"):
        state = {**Masked().state_dict(), name: torch.ones_like(model.get_buffer(name))}
        with pytest.raises(RewriteError, match=f"a proof depends on the value of '{name}'"):
            copy.deepcopy(rewritten).load_state_dict(state)
    assert float(rewritten.get_buffer("offset")[0]) == 1


def test_a_pickle_is_one_clear_error(model: Attention) -> None:
    with pytest.raises(RewriteError, match=r"can't be pickled: use its save"):
        pickle.dumps(rewrite(model, example(), config=ALWAYS))


def test_the_result_moves_copies_and_is_captured_again(model: Attention) -> None:
    x, mask = example()
    rewritten = rewrite(model, (x, mask), config=ALWAYS)
    expected = model(x, mask)["y"]
    twin = copy.deepcopy(rewritten)
    assert relative_error(twin(x, mask)["y"], expected) < 2e-5
    assert str(twin.report) == str(rewritten.report)
    exported = torch.export.export(rewritten, (x, mask), strict=False).module()
    assert relative_error(exported(x, mask)["y"], expected) < 2e-5
    traced = torch.jit.trace(rewritten, (x, mask), strict=False)
    assert relative_error(traced(x, mask)["y"], expected) < 2e-5
    compiled = torch.compile(rewritten, backend="eager")
    assert relative_error(compiled(x, mask)["y"], expected) < 2e-5
    moved = twin.to("meta")
    assert moved(x.to("meta"), mask.to("meta"))["y"].device.type == "meta"


def test_a_rewritten_module_is_rewritten_to_itself(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    with pytest.warns(RewriteWarning, match="is rewritten already"):
        again = rewrite(rewritten, example(), config=ALWAYS)
    assert len(kernel_calls(again)) == 1
    assert again.report.sites == ()


def test_an_exported_program(model: Attention) -> None:
    x, mask = example()
    program = torch.export.export(model, (x, mask), strict=False)
    rewritten = rewrite(program, config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert rewritten.report.sites[0].max_error is not None
    assert relative_error(rewritten(x, mask)["y"], model(x, mask)["y"]) < 2e-5


def test_a_graph_module_with_shapes_needs_no_inputs(model: Attention) -> None:
    x, mask = example()
    graph = torch.export.export(model, (x, mask), strict=False).module()
    code = graph.code
    rewritten = rewrite(graph, config=ALWAYS)
    assert graph.code == code
    assert len(rewritten.report.replaced) == 1
    assert rewritten.report.sites[0].max_error is None
    assert relative_error(rewritten(x, mask)["y"], model(x, mask)["y"]) < 2e-5


def test_a_torch_level_graph_module() -> None:
    q, k, v = (3 * torch.randn(2, 4, 8, 16) for _ in range(3))
    traced = fx.symbolic_trace(_Plain())
    with pytest.raises(InputError, match=r"placeholder 'q' carries no shape"):
        rewrite(traced, config=ALWAYS)
    from torch.fx.passes.shape_prop import ShapeProp

    ShapeProp(traced).propagate(q, k, v)
    rewritten = rewrite(traced, config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert relative_error(rewritten(q, k, v), traced(q, k, v)) < 2e-5


class _Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v


def test_modes(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    assert rewritten.eval() is rewritten
    with pytest.raises(RewriteError, match=r"captured in eval mode: call model\.train\(\)"):
        rewritten.train()
    active = rewrite(Attention(dropout=0.5).train(), example(), config=ALWAYS)
    assert active.training and not active.report.replaced
    assert "dropout is active" in active.report.kept[0].reasons[0]
    inactive = rewrite(Attention().train(), example(), config=ALWAYS)
    assert inactive.training and len(inactive.report.replaced) == 1


def test_gradients_flow_through_the_kernel(model: Attention) -> None:
    x, mask = example()
    model = model.train()
    rewritten = rewrite(model, (x, mask), config=ALWAYS)
    gradients = []
    for module in (model, rewritten):
        model.zero_grad()
        module(x, mask)["y"].square().sum().backward()
        gradients.append(model.qkv.weight.grad.clone())  # type: ignore[union-attr]
    assert relative_error(*reversed(gradients)) < 1e-4


def test_an_input_that_is_not_read_is_named() -> None:
    with pytest.warns(RewriteWarning, match="does not read its input attention_mask"):
        rewritten = rewrite(_Ignores(), example(), config=ALWAYS)
    assert rewritten.report.unused_inputs == ("attention_mask",)


class _Ignores(nn.Module):
    """Looks at the mask while it is traced, as models do that skip a mask of ones."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_a_site_over_tolerance_is_put_back() -> None:
    strict = RewriteConfig(policy="always", tolerances={torch.float32: 1e-12})
    model, inputs = _Plain(), tuple(3 * torch.randn(1, 2, 40, 16) for _ in "qkv")
    with pytest.warns(RewriteWarning, match="stays native, put back"):
        rewritten = rewrite(model, inputs, config=strict)
    (site,) = rewritten.report.kept
    assert site.strategy is FlashAttentionStrategy.NONE and site.max_error is not None
    assert not kernel_calls(rewritten)
    assert torch.equal(rewritten(*inputs), model(*inputs))


def test_a_wrong_kernel_is_caught(model: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is one of numbers: a kernel call with a wrong scale goes back."""

    def wrong(module: Any, grafts: Any, inputs: Any, config: Any) -> Any:
        for g in grafts:
            call = next(n for n in g.added if n.target is torch.ops.neuron_attn.flash_fwd.default)
            call.kwargs = {**call.kwargs, "scale": call.kwargs["scale"] * 1.01}
        return compare(module, grafts, inputs, config)

    monkeypatch.setattr("neuron_attn_rewrite.rewriter.compare", wrong)
    with pytest.warns(RewriteWarning, match="put back"):
        rewritten = rewrite(model, example(), config=ALWAYS)
    assert not rewritten.report.replaced


def test_without_verification(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=RewriteConfig(policy="always", verify=False))
    assert len(rewritten.report.replaced) == 1
    assert rewritten.report.sites[0].max_error is None


class _Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.cache[:, :, :4] = x
        return F.scaled_dot_product_attention(x, self.cache, self.cache)


def test_verification_leaves_caches_as_they_were() -> None:
    model = _Cached()
    x = torch.randn(1, 2, 4, 4)
    rewritten = rewrite(model, (x,), config=ALWAYS)
    assert not model.cache.any()
    assert len(rewritten.report.replaced) == 1
    got = rewritten(x)
    assert model.cache.any()
    assert relative_error(got, model(x)) < 2e-5


def test_the_report(model: Attention) -> None:
    report = rewrite(model, example(), config=RewriteConfig(policy="always", target="trn1")).report
    (site,) = report.sites
    assert (site.batch, site.num_heads, site.num_kv_heads, site.q_len, site.kv_len) == (2, 4, 4, 10, 10)
    assert (site.head_dim, site.v_head_dim, site.dtype) == (8, 8, torch.float32)
    assert site.scale == pytest.approx(8**-0.5)
    assert site.pattern == "scaled_dot_product_attention"
    assert site.kernel == "flash_fwd" and site.strategy is FlashAttentionStrategy.UNSHARDED_KERNEL
    assert "scaled_dot_product_attention" in site.removed_nodes
    assert any("flash_fwd" in name for name in site.added_nodes)
    assert site.max_error is not None and site.max_error < 2e-5
    text = str(report)
    for word in ("1 of 1", "trn1", "key_padding(attention_mask)", "flash_fwd", "UNSHARDED_KERNEL", "LNC 1"):
        assert word in text
    data = json.loads(report.to_json())
    assert data["replaced"] == 1 and data["kept"] == 0
    assert data["sites"][0]["mask"]["claims"] == [{"kind": "KeyPadding", "source": "attention_mask"}]
    assert data["sites"][0]["strategy"] == "UNSHARDED_KERNEL"


def test_counts_come_from_the_graph(model: Attention) -> None:
    rewritten = rewrite(model, example(), config=ALWAYS)
    report = rewritten.report
    assert report.nodes_after == len(rewritten.graph.nodes)
    names = {node.name for node in rewritten.graph.nodes}
    assert set(report.sites[0].added_nodes) <= names
    assert not set(report.sites[0].removed_nodes) & names


def test_a_config_that_is_none(model: Attention) -> None:
    for call in (rewrite, explain):
        with pytest.raises(ConfigError, match=r"config must be a RewriteConfig\(...\), not dict"):
            call(model, example()[0], config={"policy": "always"})  # type: ignore[arg-type]


def test_nothing_to_do_is_no_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewritten = rewrite(nn.Linear(3, 3), (torch.ones(1, 3),))
    assert rewritten.report.sites == ()
    assert "0 of 0" in str(rewritten.report)


def test_integer_queries_are_refused() -> None:
    q = torch.ones(1, 1, 4, 8, dtype=torch.int64)
    with pytest.raises(InputError, match="query"):
        torch.ops.neuron_attn.flash_fwd(q, q, q, scale=1.0)


class TwoPaths(nn.Module):
    """Drops the mask while it is traced, as some models do where it is all ones; `other` is what it then gives."""

    def __init__(self, other: float) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(x, x, x)
        return out * self.other if torch.compiler.is_exporting() else out


def test_a_capture_that_is_not_the_model_is_an_error() -> None:
    x = torch.randn(1, 2, 8, 4)
    assert rewrite(TwoPaths(1.0).eval(), (x,), config=ALWAYS).report.capture_error == 0
    for other in (0.5, 0.98):
        with pytest.raises(CaptureError, match=r"is not the model: on the example inputs.*differ by (50|2)\.0%"):
            rewrite(TwoPaths(other).eval(), (x,), config=ALWAYS)
    unchecked = RewriteConfig(policy="always", verify=False)
    assert rewrite(TwoPaths(0.5).eval(), (x,), config=unchecked).report.capture_error is None


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) + torch.rand_like(x)


def test_a_capture_that_draws_numbers_is_compared_with_the_same_numbers() -> None:
    assert rewrite(Draws(), (torch.randn(1, 2, 8, 4),), config=ALWAYS).report.capture_error == pytest.approx(
        0, abs=1e-6
    )
