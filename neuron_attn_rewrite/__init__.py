"""Rewrites the attention of PyTorch models into NKI flash attention kernels, where it can be proven equal."""

from neuron_attn_rewrite.backends.compile import collect_reports
from neuron_attn_rewrite.backends.explain import explain
from neuron_attn_rewrite.backends.huggingface import register_with_transformers
from neuron_attn_rewrite.backends.trace import TraceCheck, rewrite_for_trace, verify_trace
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import CaptureError, ConfigError, InputError, RewriteError, RewriteWarning, TraceError
from neuron_attn_rewrite.module import RewrittenModule
from neuron_attn_rewrite.report.model import RewriteReport, SiteReport
from neuron_attn_rewrite.rewriter import rewrite

__all__ = [
    "CaptureError",
    "ConfigError",
    "FlashAttentionStrategy",
    "InputError",
    "RewriteConfig",
    "RewriteError",
    "RewriteReport",
    "RewriteWarning",
    "RewrittenModule",
    "SiteReport",
    "TraceCheck",
    "TraceError",
    "collect_reports",
    "explain",
    "register_with_transformers",
    "rewrite",
    "rewrite_for_trace",
    "verify_trace",
]
