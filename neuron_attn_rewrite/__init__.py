"""Rewrites the attention of PyTorch models into NKI flash attention kernels, where it can be proven equal.

Each public name is imported when it is first used, so that a part such as `neuron_attn_rewrite.simulator` can be used
without the rest. The operators `torch.ops.neuron_attn` are there after `import neuron_attn_rewrite.ops`, and after any
function of this package was used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_attn_rewrite.backends.compile import collect_reports
    from neuron_attn_rewrite.backends.explain import explain
    from neuron_attn_rewrite.backends.huggingface import register_with_transformers
    from neuron_attn_rewrite.backends.trace import TraceCheck, rewrite_for_trace, verify_trace
    from neuron_attn_rewrite.config.options import RewriteConfig
    from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
    from neuron_attn_rewrite.errors import (
        CaptureError,
        ConfigError,
        InputError,
        RewriteError,
        RewriteWarning,
        TraceError,
    )
    from neuron_attn_rewrite.generation.build import rewrite_for_generation
    from neuron_attn_rewrite.generation.generator import Generator
    from neuron_attn_rewrite.module import RewrittenModule
    from neuron_attn_rewrite.report.data import SiteReport
    from neuron_attn_rewrite.report.report import RewriteReport
    from neuron_attn_rewrite.rewriter import rewrite
    from neuron_attn_rewrite.version import __version__

_HOME = {
    "CaptureError": "errors",
    "ConfigError": "errors",
    "FlashAttentionStrategy": "config.strategies",
    "Generator": "generation.generator",
    "InputError": "errors",
    "RewriteConfig": "config.options",
    "RewriteError": "errors",
    "RewriteReport": "report.report",
    "RewriteWarning": "errors",
    "RewrittenModule": "module",
    "SiteReport": "report.data",
    "TraceCheck": "backends.trace",
    "TraceError": "errors",
    "__version__": "version",
    "collect_reports": "backends.compile",
    "explain": "backends.explain",
    "register_with_transformers": "backends.huggingface",
    "rewrite": "rewriter",
    "rewrite_for_generation": "generation.build",
    "rewrite_for_trace": "backends.trace",
    "verify_trace": "backends.trace",
}
"""The module of each public name."""

__all__ = [
    "CaptureError",
    "ConfigError",
    "FlashAttentionStrategy",
    "Generator",
    "InputError",
    "RewriteConfig",
    "RewriteError",
    "RewriteReport",
    "RewriteWarning",
    "RewrittenModule",
    "SiteReport",
    "TraceCheck",
    "TraceError",
    "__version__",
    "collect_reports",
    "explain",
    "register_with_transformers",
    "rewrite",
    "rewrite_for_generation",
    "rewrite_for_trace",
    "verify_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
