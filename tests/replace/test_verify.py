"""`verify` finds faults that the example inputs, such as a mask of ones, do not show. What is right stays replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from neuron_attn_rewrite import RewriteConfig, RewriteReport, RewriteWarning, rewrite, rewriter
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.masks import prove
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.prove import Prover
from neuron_attn_rewrite.masks.spec import Band, EmptyRows, KeyPadding, MaskSpec, Unproven
from neuron_attn_rewrite.patterns import softmaxes
from neuron_attn_rewrite.patterns.site import AttentionSite
from neuron_attn_rewrite.replace import verify
from neuron_attn_rewrite.replace.draws import draws
from neuron_attn_rewrite.replace.graft import graft
from tests.helpers import ALWAYS, Function

LENGTH = 12
LOWEST = torch.finfo(torch.float32).min
FLASH = torch.ops.neuron_attn.flash_fwd.default

Model = Callable[..., Any]


def qkv(scale: float = 1.0, length: int = LENGTH) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(scale * torch.randn(2, 2, length, 16) for _ in "qkv")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape or (2, LENGTH), dtype=torch.int64)


class Masked(Function):
    """A function of an `attention_mask`. The name is part of its contract: such an input holds zeros and ones."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Any:
        return self.function(query, key, value, attention_mask)


def as_module(model: Model) -> nn.Module:
    return Masked(model) if "attention_mask" in signature(model).parameters else Function(model)


def rewritten(model: Model, inputs: tuple[Any, ...], config: RewriteConfig = ALWAYS) -> RewriteReport:
    module = model if isinstance(model, nn.Module) else as_module(model)
    return rewrite(module, inputs, config=config).report


def put_back(report: RewriteReport) -> list[str]:
    return [str(r) for site in report.kept for r in site.reasons if r.code == "put-back"]


# Models


def hidden(q: Tensor, k: Tensor, attention_mask: Tensor, fill: float = -torch.inf) -> Tensor:
    return (q @ k.mT / 4).masked_fill(attention_mask[:, None, None, :] == 0, fill)


def padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None, :].bool())


def next_key(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    return padded(q, k, v, attention_mask[:, 1:])


def causal_and_padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    index = torch.arange(q.shape[2])
    visible = (index[None, :] <= index[:, None]) & attention_mask[:, None, None, :].bool()
    return (q @ k.mT / 4).masked_fill(~visible, LOWEST).softmax(-1) @ v


def cached(q: Tensor, k: Tensor, v: Tensor, cache_position: Tensor) -> Tensor:
    visible = torch.arange(k.shape[2])[None, :] <= cache_position[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def window(q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
    """A causal mask with a window of positions. Those of the example are so close that the window hides no key."""
    distance = places[:, None, :, None] - places[:, None, None, :]
    index = torch.arange(q.shape[2])
    visible = (index[None, :] <= index[:, None]) & (distance < LENGTH)
    return (q @ k.mT / 4).masked_fill(~visible, LOWEST).softmax(-1) @ v


def mean(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """A row that sees no key gets the mean of all values."""
    return hidden(q, k, attention_mask, LOWEST).softmax(-1) @ v


def read(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """A row that sees no key is NaN, and then 1."""
    return torch.nan_to_num(hidden(q, k, attention_mask).softmax(-1) @ v, nan=1.0)


def undefined(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """A row that sees no key is NaN, and stays NaN."""
    return (hidden(q, k, attention_mask).softmax(-1) @ v) * 2


def added(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """A row that sees no key gets the softmax of what rounding leaves of its scores."""
    return (q @ k.mT / 4 + (1 - attention_mask[:, None, None, :].float()) * -1e6).softmax(-1) @ v


def in_half(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    return hidden(q, k, attention_mask, torch.finfo(torch.bfloat16).min).softmax(-1) @ v


def given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def guarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax by hand, with the maximum of each column. So the guard of the sum is reached if scores are large."""
    scores = q @ k.mT / 4
    weights = torch.exp(scores - scores.amax(-2, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1.0)) @ v


def chained(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    return padded(padded(q, k, v, attention_mask), k, v, attention_mask)


def sensitive(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """It makes much of a little rounding."""
    return torch.sin(causal_and_padded(q, k, v, attention_mask) * 1e5)


def factored(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor) -> Tensor:
    """It raises an error if the matrix is not positive definite."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.linalg.cholesky(matrix))


def indexed(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
    """Positions point into a table that is shorter than the keys are many."""
    table = torch.arange(8).float()
    q = q + table[position_ids][:, None, :, None]
    visible = position_ids[:, None, None, :] <= position_ids[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


# Faults


@dataclass(frozen=True)
class Fault:
    """Something that is proven wrongly of a model, and does not show on the example inputs."""

    model: Model
    inputs: tuple[Any, ...]
    put: Callable[[pytest.MonkeyPatch], None]
    config: RewriteConfig = ALWAYS


def claims(change: Callable[[Proof], Proof]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change what is proven of each attention."""
    prove = Prover.prove

    def changed(self: Prover, site: AttentionSite) -> Proof | Unproven:
        found = prove(self, site)
        return found if isinstance(found, Unproven) else change(found)

    return lambda monkeypatch: monkeypatch.setattr(Prover, "prove", changed)


def without_padding(proof: Proof) -> Proof:
    kept = tuple(claim for claim in proof.mask.claims if not isinstance(claim, KeyPadding))
    return replace(proof, mask=MaskSpec(kept), paddings=())


def shifted(proof: Proof) -> Proof:
    return replace(proof, paddings=tuple(replace(p, start=p.start - 1) for p in proof.paddings))


def only_causal(proof: Proof) -> Proof:
    return Proof(MaskSpec((Band(upper=0),)))


def reads_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "nan_is_read", lambda _: False)


def drops_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmaxes, "_largest_along", lambda node: 3)


def raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel call raises an error if a key is hidden."""

    def all_seen(padding: Tensor) -> Tensor:
        if not padding.all():
            raise ValueError("no padding, please")
        return padding

    def changed(module: fx.GraphModule, *args: Any) -> Any:
        grafts, failed = graft(module, *args)
        more = []
        for g in grafts:
            call = next(n for n in g.added if n.target is FLASH)
            with module.graph.inserting_before(call):
                checked = module.graph.call_function(all_seen, (call.kwargs["key_padding"],))
            call.update_kwarg("key_padding", checked)
            more.append(replace(g, added=(*g.added, checked)))
        return more, failed

    monkeypatch.setattr(rewriter, "graft", changed)


FAULTS = {
    "padding dropped": Fault(causal_and_padded, (*qkv(), ones()), claims(without_padding)),
    "padding dropped, tiny operands": Fault(causal_and_padded, (*qkv(1e-4), ones()), claims(without_padding)),
    "padding shifted by one key": Fault(next_key, (*qkv(), ones(2, LENGTH + 1)), claims(shifted)),
    "a bound of positions dropped": Fault(
        cached, (*qkv(), torch.full((LENGTH,), LENGTH - 1)), claims(lambda proof: Proof(MaskSpec()))
    ),
    "a window of positions taken for causal": Fault(
        window, (*qkv(), torch.arange(LENGTH).expand(2, LENGTH)), claims(only_causal)
    ),
    "a bool mask taken for causal": Fault(
        given, (*qkv(), torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()), claims(only_causal)
    ),
    "an added mask dropped": Fault(given, (*qkv(), torch.zeros(2, 1, LENGTH, LENGTH)), claims(lambda _: Proof())),
    "zeros for the mean": Fault(
        mean, (*qkv(), ones()), claims(lambda proof: replace(proof, empty_rows=EmptyRows.ZERO))
    ),
    "a NaN that is read": Fault(read, (*qkv(), ones()), reads_no_nan),
    "a guard dropped": Fault(guarded, qkv(0.1), drops_guards, replace(ALWAYS, weights="beside")),
    "an error": Fault(padded, (*qkv(), ones()), raises),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_the_example_does_not_show_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.put(monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(verify, "draws", lambda *_: [])
        assert rewritten(fault.model, fault.inputs, fault.config).replaced
    with pytest.warns(RewriteWarning, match="put back: .*on inputs with "):
        report = rewritten(fault.model, fault.inputs, fault.config)
    assert not report.replaced and len(put_back(report)) == 1


def test_nan_of_an_operand_counts_if_it_is_read() -> None:
    """The model multiplies a hidden value of NaN by zero, and the kernel skips it."""
    q, k, v = qkv(length=600)
    v[:, :, -1] = torch.nan
    causal = torch.ones(600, 600, dtype=torch.bool).tril()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).masked_fill(~causal, -torch.inf).softmax(-1) @ v

    assert not put_back(rewritten(attention, (q, k, v)))
    (reason,) = put_back(rewritten(lambda *x: attention(*x).nan_to_num(7.0), (q, k, v)))
    assert "in the outputs" not in reason


def test_the_report_names_the_error_of_a_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch)
    with pytest.warns(RewriteWarning, match="ValueError: no padding, please"):
        assert not rewritten(padded, (*qkv(), ones())).replaced


def test_only_the_wrong_attention_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the other one reads its result."""
    seen: list[AttentionSite] = []

    def first(self: Prover, site: AttentionSite) -> Any:
        seen.append(site)
        proof = prove_(self, site)
        return without_padding(proof) if len(seen) == 1 else proof

    prove_ = Prover.prove
    monkeypatch.setattr(Prover, "prove", first)
    with pytest.warns(RewriteWarning, match="put back"):
        report = rewritten(chained, (*qkv(), ones()))
    assert [site.is_replaced for site in report.sites] == [False, True]


# What is right


POSITIONS = torch.arange(LENGTH)
RIGHT: dict[str, tuple[Model, tuple[Any, ...], RewriteConfig]] = {
    **{
        model.__name__: (model, (*qkv(), ones()), ALWAYS)
        for model in (padded, causal_and_padded, mean, undefined, added, in_half, chained, sensitive)
    },
    "large scores": (added, (*qkv(30.0), ones()), ALWAYS),
    "padding in the example": (causal_and_padded, (*qkv(), ones().tril(5)), ALWAYS),
    "rows that do not matter": (added, (*qkv(), ones()), replace(ALWAYS, empty_rows="any")),
    "promised padding": (causal_and_padded, (*qkv(), ones()), replace(ALWAYS, padding="right")),
    "a longer mask": (next_key, (*qkv(), ones(2, LENGTH + 1)), ALWAYS),
    "positions of a cache": (cached, (*qkv(), POSITIONS), ALWAYS),
    "positions": (window, (*qkv(), POSITIONS.expand(2, LENGTH)), ALWAYS),
    "positions in a table": (indexed, (*qkv(), POSITIONS.expand(2, LENGTH) % 8), ALWAYS),
    "a bool mask": (given, (*qkv(), torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)), ALWAYS),
    "an added mask": (given, (*qkv(), torch.zeros(2, 1, LENGTH, LENGTH)), ALWAYS),
    "a bias": (given, (*qkv(), torch.randn(1, 2, LENGTH, LENGTH)), ALWAYS),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("error::neuron_attn_rewrite.RewriteWarning")
def test_nothing_right_is_put_back(name: str) -> None:
    model, inputs, config = RIGHT[name]
    report = rewritten(model, inputs, config)
    assert report.replaced and not report.kept, str(report)
    draws = 3 if config.padding == "right" else 4
    assert all(site.draws == draws for site in report.replaced)
    assert f"on the example and {draws} drawn inputs" in str(report)


@pytest.mark.filterwarnings("error::neuron_attn_rewrite.RewriteWarning")
def test_a_value_that_is_a_piece_of_the_keys_is_not_drawn_apart() -> None:
    def latent(query: Tensor, key: Tensor) -> Tensor:
        a, b = key.cos().split((4, 12), -1)
        scores = query[..., 4:] @ b.mT + query[..., :4] @ a.mT
        return torch.softmax(scores * 0.25, -1) @ b

    assert rewritten(latent, qkv()[:2]).replaced


@pytest.mark.filterwarnings("error::neuron_attn_rewrite.RewriteWarning")
def test_nan_where_a_sink_gives_zeros_does_not_count() -> None:
    """The softmax has no sink, and gives NaN in rows that see no key. The gate adds the sink."""

    def gated(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        scores = (query @ key.mT * 0.25).masked_fill(attention_mask[:, None, None] == 0, -torch.inf)
        gate = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - torch.arange(2.0)[:, None, None])
        return (torch.softmax(scores, -1) @ value) * gate

    assert rewritten(gated, (*qkv(), ones().tril(-1))).replaced


def test_the_report_says_where_no_input_could_be_drawn() -> None:
    (site,) = rewritten(factored, (*qkv(), torch.eye(LENGTH))).replaced
    assert site.draws == 0 and "example-only" in {r.code for r in site.reasons}


def test_a_large_graph_runs_as_a_whole_on_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention is compared with drawn operands on all of them."""
    seen: list[str] = []
    whole = verify._compare_graph
    monkeypatch.setattr(verify, "_compare_graph", lambda *args: (seen.append(args[-1]), whole(*args))[1])
    for elements, runs in ((2**26, 5), (2**13, 2), (1, 1)):
        seen.clear()
        monkeypatch.setattr(verify, "MOST_ELEMENTS", elements)
        (site,) = rewritten(causal_and_padded, (*qkv(), ones())).replaced
        assert site.draws == 4 and len(seen) == runs, seen
        assert "on inputs with a row that sees no key" in seen or runs == 1


def test_inputs_buffers_and_random_state_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2, 2, LENGTH, 16))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
            self.calls += 1
            return causal_and_padded(q, k + self.calls, v, attention_mask)

    model, inputs = Counts(), (*qkv(), ones())
    copies, state = [x.clone() for x in inputs], torch.get_rng_state()
    assert rewritten(model, inputs).replaced
    assert all(map(torch.equal, inputs, copies)) and not model.calls.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_have_padding_on_each_side_and_empty_rows() -> None:
    module = capture(Masked(causal_and_padded), (*qkv(), ones())).module
    masks = {draw.words: draw.tries[0][3] for draw in draws(module.graph, [], (*qkv(), ones()))}
    assert len(masks) == 4 and all(set(mask.unique().tolist()) == {0, 1} for mask in masks.values())
    assert masks["with padding on the left"][:, -1].all() and not masks["with padding on the left"][:, 0].all()
    assert masks["with padding on the right"][:, 0].all() and not masks["with padding on the right"][:, -1].all()
    assert not masks["with a row that sees no key"][-1].any()


def test_an_input_that_breaks_the_contract_is_not_drawn_as_zeros_and_ones() -> None:
    inputs = (*qkv(), 2 * ones())
    assert all(s.draws for s in rewritten(padded, inputs).replaced)
