"""Whether a report meets what the caller asked for: `RewriteConfig.require` and `RewriteConfig.sites`."""

from __future__ import annotations

from fnmatch import fnmatchcase

from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.errors import RewriteError
from neuron_attn_rewrite.report.report import RewriteReport


def check_required(report: RewriteReport, config: RewriteConfig) -> None:
    """Check the number of replaced attentions.

    Raises:
        RewriteError: it is not the number of `config.require`.
    """
    found, replaced = len(report.sites), len(report.replaced)
    if config.require is None or replaced == (max(found, 1) if config.require == "all" else config.require):
        return
    if not found:
        raise RewriteError(
            f"RewriteConfig.require={config.require!r}, but no attention was found in the model: pass the model or the "
            "submodule that computes the attention, or set require=None."
        )
    kept = [f"{site.name}: {site.reasons[-1]}" for site in report.kept if site.reasons]
    shown = "".join(f"\n  {line}" for line in kept[:3]) + (f"\n  and {len(kept) - 3} more" if len(kept) > 3 else "")
    raise RewriteError(
        f"RewriteConfig.require={config.require!r}, but {replaced} of {found} attentions were replaced.{shown}"
    )


def unmatched_sites(report: RewriteReport, config: RewriteConfig) -> tuple[str, ...]:
    """A warning for each pattern of `config.sites` that matches no attention: it is probably misspelt."""
    names = [site.name for site in report.sites]
    return tuple(
        f"RewriteConfig.sites[{pattern!r}] matches no attention; they are {', '.join(names[:3]) or 'none'}"
        + (f" and {len(names) - 3} more." if len(names) > 3 else ".")
        for pattern in config.sites
        if not any(fnmatchcase(name, pattern) for name in names)
    )
