"""Draws a mask as a small square: queries from top to bottom, keys from left to right, visible pairs in ink."""

from __future__ import annotations

from collections.abc import Iterator

from neuron_attn_rewrite.masks.spec import KeyPadding, Limited, MaskSpec
from neuron_attn_rewrite.report.data import SiteReport

CELLS = 32
"""The most rows of the picture. A mask with more queries is sampled."""


def mask_svg(site: SiteReport) -> str:
    """An SVG of 64 x 64 units.

    A hatched strip below means key padding or limits that are known at run time only. Dots mean a dense bias.
    """
    return (
        '<svg class="mask" viewBox="-2 -2 68 74" role="img" aria-label="' + _words(site) + '">'
        '<rect class="field" width="64" height="64"/>' + "".join(_parts(site)) + "</svg>"
    )


def _words(site: SiteReport) -> str:
    return f"mask: {site.mask}".replace("&", "and").replace('"', "'").replace("<", " ")


def _parts(site: SiteReport) -> Iterator[str]:
    mask = site.mask
    if not isinstance(mask, MaskSpec) or not site.q_len or not site.kv_len:
        yield '<text class="unknown" x="32" y="44">?</text>'
        return
    yield f'<path class="seen" d="{_seen(mask, site.q_len, site.kv_len)}"/>'
    if site.bias:
        yield '<rect class="dense" width="64" height="64"/>'
    if any(isinstance(claim, (KeyPadding, Limited)) for claim in mask.claims):
        yield '<rect class="padding" y="66.5" width="64" height="5"/>'


def _seen(mask: MaskSpec, q_len: int, kv_len: int) -> str:
    """The SVG path of the visible keys: one rectangle for each row of the picture, for the query in its middle."""
    rows = mask.rows(q_len, kv_len)
    count = min(q_len, CELLS)
    height, width = 64 / count, 64 / kv_len
    pieces = []
    for i in range(count):
        first, end = rows[(2 * i + 1) * q_len // (2 * count)].tolist()
        if first < end:
            x, w = first * width, max((end - first) * width, 1.0)
            pieces.append(f"M{x:.4g} {i * height:.4g}h{w:.4g}v{height:.4g}h-{w:.4g}z")
    return "".join(pieces)
