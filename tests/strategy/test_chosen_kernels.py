"""Nothing is chosen that a kernel can't compute: problems are drawn, and the chosen kernel's stand-in must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.kernels import reference, vendor
from neuron_attn_rewrite.kernels.vendor.adapter import How
from neuron_attn_rewrite.masks.spec import Band, Chunked, EmptyRows, Intervals, KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.ops.arguments import checked_terms
from neuron_attn_rewrite.problem import AttentionProblem
from neuron_attn_rewrite.strategy.choose import NATIVE, candidates, choose
from neuron_attn_rewrite.strategy.clauses import mask
from tests import stand_ins

LENGTHS = (5, 100, 200)
LOOSE = {torch.float32: 0.016}
"""The SDK's kernels round float32 to bfloat16; the stand-ins do not, so that a wrong number shows."""


@st.composite
def problems(draw: st.DrawFn, kind: str) -> tuple[AttentionProblem, dict[str, Any]]:
    """A problem and the keyword arguments of the op that stand for its mask and terms: "plain" for the kernels that
    take little, "decode" for those of token generation, "prefill" for those of a cache in blocks, "wide" for those that
    take nearly everything.
    """
    plain, prefill = kind == "plain", kind == "prefill"
    batch, kv_heads, group = draw(st.sampled_from(((1, 2, 2), (2, 1, 2), (1, 1, 1))))
    lengths = {"plain": (512, 512, 3), "decode": (1, 5), "prefill": (128, 256), "wide": LENGTHS}[kind]
    heads, q_len = kv_heads * group, draw(st.sampled_from(lengths))
    others = {
        "plain": (512, 512, 1024),
        "decode": (300, 512),
        "prefill": (q_len, q_len + 128, q_len + 300),
        "wide": (q_len, q_len + 128, 300),
    }[kind]
    kv_len, head_dim = draw(st.sampled_from(others)), draw(st.sampled_from((128,) if prefill else (8, 16)))
    free = [None, 0, kv_len - q_len, kv_len - q_len, draw(st.integers(-3, kv_len))]
    upper = draw(st.sampled_from({"plain": [None, 0, 0], "prefill": [0, 128, 256]}.get(kind, free)))
    windows = {"plain": (None, 5, 300), "prefill": (None, 128, 256, 300)}.get(kind, (None, None, 1, 5, 300))
    window = draw(st.sampled_from(windows))
    lower = None if upper is None or window is None else upper - window + 1
    options: dict[str, Any] = {"scale": draw(st.sampled_from((1.0, 0.3, -0.5)))}
    claims: list[Any] = []
    if (lower, upper) != (None, None):
        claims.append(Band(lower, upper))
        options |= {"band_lower": lower, "band_upper": upper}
    if kind in ("decode", "wide") and draw(st.integers(0, 4)) == 0:
        size = draw(st.sampled_from((50, 128, 256)))
        claims.append(Chunked(size))
        options["bounds"] = Chunked(size).rows(q_len, kv_len)[None]
    elif kind in ("decode", "wide") and draw(st.integers(0, 2)) == 0:
        rows = tuple((i * kv_len // q_len // 2, kv_len - i % 3) for i in range(q_len))
        claims.append(Intervals(rows))
        options["bounds"] = torch.tensor([rows])
    elif kind in ("decode", "wide") and draw(st.integers(0, 2)) == 0:
        claims.append(Limited("key >= first[batch, query]"))
        first = torch.randint(0, kv_len // 2 + 1, (batch, q_len))
        options["bounds"] = torch.stack([first, torch.full_like(first, kv_len)], -1)
    if kind in ("decode", "wide") and draw(st.integers(0, 2)) == 0:
        claims.append(KeyPadding("mask"))
        options["key_padding"] = torch.rand(batch, kv_len) > 0.3
    bias_shape = None
    if plain and q_len > 3 and window is None and draw(st.integers(0, 2)) == 0:
        bias_shape = (1, 1, q_len, kv_len)
    elif kind == "wide" and draw(st.booleans()):
        bias_shape = (
            draw(st.sampled_from((1, batch))),
            draw(st.sampled_from((1, heads))),
            draw(st.sampled_from((1, q_len))),
            kv_len,
        )
    if bias_shape:
        options["bias"] = torch.randn(bias_shape)
    sink = not plain and draw(st.booleans())
    if sink:
        options["sink"] = torch.randn(heads)
    mask = MaskSpec(tuple(claims))
    rows_seen = mask.rows(q_len, kv_len)
    hidden = "key_padding" in options or any(isinstance(claim, Limited) for claim in claims)
    empty = hidden or bool((rows_seen[:, 0] >= rows_seen[:, 1]).any())
    problem = AttentionProblem(
        batch=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_head_dim=draw(st.sampled_from((head_dim, 24))) if kind == "wide" else head_dim,
        dtype=torch.bfloat16 if prefill else torch.float32,
        scale=options["scale"],
        mask=mask,
        bias_shape=bias_shape,
        sink=sink,
        empty_rows=draw(st.sampled_from((EmptyRows.ANY, EmptyRows.ANY, EmptyRows.ZERO))) if empty else EmptyRows.NEVER,
    )
    return problem, options


def features_of(problem: AttentionProblem) -> set[str]:
    claims = problem.mask.claims
    found = {
        "grouped": problem.num_heads != problem.num_kv_heads,
        "chunks": any(isinstance(claim, Chunked) for claim in claims),
        "limits": any(isinstance(claim, Limited) for claim in claims),
        "padding": any(isinstance(claim, KeyPadding) for claim in claims),
        "window": mask(problem).window is not None,
        "bias": problem.bias_shape is not None,
        "sink": problem.sink,
        "other v_head_dim": problem.head_dim != problem.v_head_dim,
    }
    return {name for name, there in found.items() if there}


TAKEN = {
    "attention_cte": {"grouped", "chunks", "limits", "padding", "window", "bias", "sink", "other v_head_dim"},
    "attention_tkg": {"grouped", "chunks", "limits", "padding", "window", "sink"},
    "attention_segmented_cte": {"grouped", "window", "sink"},
    "attention_isa_kernel": {"grouped"},
    "neuronxcc_flash_fwd": {"grouped", "window", "bias"},
    "sliding_window_flash_fwd": {"grouped", "window"},
}
PLACES = (("trn2", "2.31"), ("trn2", "2.29"), ("trn1", "2.28"))


def test_what_is_chosen_is_right() -> None:
    kinds: set[tuple[str, str, bool]] = set()
    features: dict[str, set[str]] = {name: set() for name in vendor.ADAPTERS}

    def check(drawn: tuple[AttentionProblem, dict[str, Any]]) -> None:
        problem, options = drawn
        for target, sdk in PLACES:
            cte = stand_ins.attention_cte_2_31 if sdk == "2.31" else stand_ins.attention_cte_2_29
            with pytest.MonkeyPatch.context() as monkeypatch:
                stand_ins.install(monkeypatch, cte)
                names = tuple(vendor.ADAPTERS)
                config = RewriteConfig(policy="always", target=target, sdk=sdk, kernels=names, tolerances=LOOSE)
                decision = choose(problem, config)
                able, refused = candidates(problem, config)
                assert {*able, *refused} == set(names)
                assert decision.kernel in able if able else decision.kernel == NATIVE
                for kernel in able:
                    kinds.add((kernel, mask(problem).kind, mask(problem).window is not None))
                    features[kernel] |= features_of(problem)
                    _check(kernel, problem, options, decision.lnc)

    for kind in ("plain", "decode", "prefill", "wide"):
        of_kind = given(problems(kind))(check)
        seed(0)(settings(max_examples=15, deadline=None, database=None)(of_kind))()
    cte = [(kind, window) for name, kind, window in kinds if name == "attention_cte"]
    assert set(cte) >= {("full", False), ("causal", False), ("causal", True), ("prior", False), ("rows", False)}
    assert {name for name, _, _ in kinds} == set(vendor.ADAPTERS)
    # Everything that a kernel takes was drawn for it, and nothing that it doesn't.
    assert features == TAKEN


def _check(kernel: str, p: AttentionProblem, options: dict[str, Any], lnc: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(p.batch, p.num_heads, p.q_len, p.head_dim, generator=generator)
    key = 2 * torch.randn(p.batch, p.num_kv_heads, p.kv_len, p.head_dim, generator=generator)
    value = torch.randn(p.batch, p.num_kv_heads, p.kv_len, p.v_head_dim, generator=generator)
    terms = checked_terms(query, key, value, **options)
    adapter = vendor.find(kernel)
    assert adapter is not None
    actual, expected = (
        adapter.attend(query, key, value, terms, How(lnc)),
        reference.attention(query, key, value, terms),
    )
    # Rows that see nothing were said not to matter.
    seen = reference.visible(terms, p.q_len, p.kv_len).any(-1)[..., None].expand_as(expected)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual[seen], expected[seen], rtol=0, atol=1e-4)
