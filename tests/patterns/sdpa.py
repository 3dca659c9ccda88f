"""scaled_dot_product_attention with all its arguments."""

from __future__ import annotations

import torch.nn.functional as F

from tests.patterns.cases import CAUSAL, D, H, Keep, Match, additive_causal, cubes, grouped, qkv, repeat_kv

sdpa = F.scaled_dot_product_attention

MATCH = {
    "plain": Match(lambda q, k, v: sdpa(q, k, v), scale=0.25),
    "causal flag": Match(lambda q, k, v: sdpa(q, k, v, is_causal=True), mask="causal(offset=0)"),
    "bool mask": Match(lambda q, k, v: sdpa(q, k, v, attn_mask=CAUSAL, scale=0.3), mask="causal(offset=0)", scale=0.3),
    "float mask": Match(lambda q, k, v: sdpa(q, k, v, attn_mask=additive_causal()), mask="causal(offset=0)"),
    "grouped flag": Match(
        lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), grouped, "causal(offset=0)", heads=(H, 2)
    ),
    "repeated keys": Match(
        lambda q, k, v: sdpa(q, repeat_kv(k), repeat_kv(v), is_causal=True), grouped, "causal(offset=0)", heads=(H, 2)
    ),
    "three dims": Match(
        lambda q, k, v: sdpa(q, k, v, is_causal=True), lambda: tuple(x[0] for x in qkv()), "causal(offset=0)"
    ),
    "two dims": Match(lambda q, k, v: sdpa(q, k, v), lambda: tuple(x[0, 0] for x in qkv())),
    "five dims": Match(
        lambda q, k, v: sdpa(*(x.unflatten(1, (2, 2)) for x in (q, k, v)), is_causal=True), mask="causal(offset=0)"
    ),
    "keys that broadcast over the batch": Match(lambda q, k, v: sdpa(q, k[:1], v[:1])),
    "all sizes equal": Match(lambda q, k, v: sdpa(q, k, v, is_causal=True), cubes, "causal(offset=0)"),
    "more keys than queries, causal flag": Match(
        lambda q, k, v: sdpa(q[:, :, :8], k, v, is_causal=True), mask="causal(offset=0)"
    ),
    "one query": Match(lambda q, k, v: sdpa(q[:, :, :1], k, v)),
    "a scale of one": Match(lambda q, k, v: sdpa(q * D**-0.5, k, v, scale=1.0), scale=0.25),
}

KEEP = {
    "dropout": Keep(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), "dropout is active"),
}
