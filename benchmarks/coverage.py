"""Coverage in detail: what was found, replaced and kept of each tiny model, and the largest error.

python -m benchmarks.coverage            print the table
python -m benchmarks.coverage --write    put it into docs/coverage.md, in the place of this stack's table
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks.pages import write_table
from neuron_attn_rewrite import CaptureError, RewriteConfig, rewrite
from tests.models import PADDINGS, Family, variants

DOCS = Path(__file__).parent.parent / "docs" / "coverage.md"


def error_at_valid_positions(
    model: torch.nn.Module, rewritten: torch.nn.Module, call: dict[str, torch.Tensor]
) -> float:
    """Largest difference of the first output, relative to its largest magnitude."""
    with torch.no_grad():
        old, new = model(**call)[0], rewritten(**call)[0]
    mask = call.get("decoder_attention_mask", call.get("attention_mask"))
    if mask is not None and old.shape[:2] == mask.shape:
        old, new = old[mask.bool()], new[mask.bool()]
    return float((old - new).abs().max() / old.abs().max())


def row(family: Family, implementation: str) -> str:
    """Captured without a mask and with ones; the second graph also runs with both paddings."""
    model = family.build(implementation)
    replaced, errors, masks, notes = [], [], [], []
    for captured_with, called_with in (("none", PADDINGS[:1]), ("ones", PADDINGS[1:])):
        try:
            rewritten = rewrite(model, (), family.call(captured_with), config=RewriteConfig(policy="always"))
        except CaptureError:
            notes.append(f"can't be captured with {captured_with} as mask")
            continue
        report = rewritten.report
        replaced.append(f"{len(report.replaced)}/{family.attentions}")
        masks += [str(site.mask) + (" + bias" if site.bias else "") for site in report.sites]
        notes += [site.reasons[-1] for site in report.kept]
        errors += [error_at_valid_positions(model, rewritten, family.call(padding)) for padding in called_with]
    said = "; ".join(dict.fromkeys(masks + notes))
    return f"| {family.name} | {implementation} | {', '.join(dict.fromkeys(replaced))} | {max(errors):.0e} | {said} |"


def table() -> str:
    """One line for each model and implementation, as Markdown."""
    warnings.simplefilter("ignore")
    head = "| model | attention | replaced | largest error | masks |\n|---|---|---|---|---|"
    return "\n".join([head, *(row(*variant) for variant in variants())])


def stack() -> str:
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/coverage.md")
    arguments = parser.parse_args()
    text = f"**{stack()}**\n\n{table()}\n"
    print(text)
    if arguments.write:
        write_table(DOCS, "coverage", text)


if __name__ == "__main__":
    main()
