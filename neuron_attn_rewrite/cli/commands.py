"""The commands and their exit codes: 0 is success, 1 a finding (a difference, a failed check), 2 an error."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.backends.compile import explain_graphs
from neuron_attn_rewrite.capture.compare import difference_with_nan
from neuron_attn_rewrite.cli import doctor as diagnosis
from neuron_attn_rewrite.cli.inputs import OWN
from neuron_attn_rewrite.cli.models import Loaded, is_function, load, memory_note
from neuron_attn_rewrite.cli.options import (
    CONFIG,
    FILE,
    MODEL,
    OUTPUT,
    REQUIRE,
    SDK,
    STDOUT,
    asked_of,
    config_of,
    refuse_given,
)
from neuron_attn_rewrite.cli.parts import not_run, reads, runs
from neuron_attn_rewrite.cli.progress import note, quiet, working
from neuron_attn_rewrite.config.options import RewriteConfig
from neuron_attn_rewrite.config.rules import SDKS
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import CaptureError, InputError, RewriteError
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.report.report import RewriteReport
from neuron_attn_rewrite.report.requirements import check_required, unmatched_sites
from neuron_attn_rewrite.rewriter import rewrite
from neuron_attn_rewrite.strategy.legality import KERNELS, OURS, PRIOR
from neuron_attn_rewrite.strategy.tables import table

NAME = "neuron-attn-rewrite"


def run(arguments: Sequence[str] | None) -> int:
    """Run a command line and return its exit code. An error is printed in one line; `--debug` adds the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    words = [a for a in given if a != "--debug"] or ["--help"]
    try:
        result = app.main(words, prog_name=NAME, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        where = f" ({error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        return _failed(f"{error.format_message()}{where}", debug)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _failed("stopped", debug)
    except RewriteError as error:
        return _failed(str(error), debug)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error} (--debug shows where)", debug)


def _failed(message: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    click.echo(f"error: {' '.join(lines)}", err=True)
    return 2


EXAMPLES = f"""\b
Examples:
  {NAME} explain llama
  {NAME} explain llama --size full --seq-len 8192 --html report.html
  {NAME} explain ./my-model --attn sdpa --json before.json
  {NAME} explain model.py:make
  {NAME} verify bert --seq-len 512 --policy always
  {NAME} diff before.json after.json

Shell completion: eval "$(_NEURON_ATTN_REWRITE_COMPLETE=bash_source {NAME})", or zsh_source, fish_source."""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="neuron-attn-rewrite", prog_name=NAME)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Rewrites the attention of PyTorch models into NKI flash attention kernels, where it can be proven equal."""


@app.command(
    epilog=f"""\b
MODEL is
  a model type             llama           a tiny model, or the real size with --size full
  a directory              ./my-model      the model of its config.json
  a config                 config.json
  a function in a file     model.py:make   returns (model, inputs)

\b
Examples:
  {NAME} explain llama --size full --seq-len 8192 --html report.html
  {NAME} explain mistral --set sliding_window=1024 --attn eager
  {NAME} explain llava --part vision_tower
  {NAME} explain bert --policy always --no-mask
  {NAME} explain bert --seq-len 512 --json - --require all    for a script

A file named - is standard output. The report then goes to standard error."""
)
@MODEL
@CONFIG
@REQUIRE
@click.option("--html", type=OUTPUT, help="Write the report as an HTML page.")
@click.option("--json", type=OUTPUT, help="Write the report as JSON.")
@click.option("--markdown", type=OUTPUT, help="Write the report as Markdown.")
@click.option("--dot", type=OUTPUT, help="Write the graphs before and after for Graphviz.")
@click.option(
    "--reproducer", "site", metavar="SITE", help="Print a script that rebuilds one attention, instead of the report."
)
def explain(
    html: Path | None,
    json: Path | None,
    markdown: Path | None,
    dot: Path | None,
    site: str | None,
    require: int | str | None,
    **given: Any,
) -> int:
    """Report what would be replaced, by what, and why. Weights are not read, so a model may have any size."""
    on_stdout = [path for path in (html, json, markdown, dot) if path == STDOUT]
    if len(on_stdout) + (site is not None) > 1:
        raise click.UsageError("only one form of the report can go to standard output.", click.get_current_context())
    report = _report(given)
    for path, text in (
        (html, report.to_html),
        (json, report.to_json),
        (markdown, report.to_markdown),
        (dot, report.to_dot),
    ):
        if path == STDOUT:
            click.echo(text())
        elif path is not None:
            path.write_text(text(), encoding="utf-8")
            click.echo(f"wrote {path}", err=True)
    if site is not None:
        click.echo(report.reproducer(int(site) if site.lstrip("-").isdigit() else site), nl=False)
    else:
        click.echo(report.to_text(color=False if on_stdout else None), err=bool(on_stdout))
    return _required(report, require)


def _required(report: RewriteReport, require: Any) -> int:
    """The exit code: 1, with a line that says so, if not as many attentions are replaced as `--require` wants."""
    try:
        check_required(report, RewriteConfig(require=require))
    except RewriteError as error:
        lines = str(error).replace(f"RewriteConfig.require={require!r}", f"--require {require}").splitlines()
        click.echo("\n".join(["not met: " + lines[0], *lines[1:]]), err=True)
        return 1
    return 0


@app.command(
    epilog=f"""\b
Examples:
  {NAME} verify llama
  {NAME} verify bert --seq-len 512 --policy always --require all
  {NAME} verify ./my-model --dtype fp32    with the weights of the directory"""
)
@MODEL
@CONFIG
@REQUIRE
def verify(require: int | str | None, **given: Any) -> int:
    """Rewrite a model, run it and the original on other inputs, and compare.

    Exit code 1 if they differ by more than the tolerance, or if nothing was replaced.
    """
    config, loaded = config_of(given, True), _loaded(given, numbers=True)
    with working(f"rewriting {type(loaded.model).__name__}"), quiet(), _own_inputs(loaded):
        rewritten = rewrite(loaded.model, loaded.args, loaded.kwargs, config=config)
    report, limit = rewritten.report, config.tolerance(_dtype_of(loaded))
    for text in (*not_run(loaded.model, reads(loaded.model, rewritten)), *unmatched_sites(report, config)):
        note(text)
    put_back = [s for s in report.kept if any(r.code == "put-back" for r in s.reasons)]
    if not report.replaced and not put_back:
        click.echo(report.to_text())
        click.echo()
        click.echo(
            "nothing was replaced, so there is nothing to compare. The report says why; --policy always takes a kernel "
            "wherever one can compute the attention."
        )
        return 1
    assert loaded.fresh is not None
    args, kwargs = loaded.fresh()
    if _same(loaded, args, kwargs):
        note("the function returns the same inputs each time: draw them at random to compare on others.")
    with torch.no_grad(), working("running both models"), quiet():
        old, new = (pytree.tree_leaves(m(*args, **kwargs)) for m in (loaded.model, rewritten))
    worst = max((_difference(a, b) for a, b in zip(old, new, strict=True)), default=0.0)
    layers = max((s.max_error for s in report.sites if s.max_error is not None), default=0.0)
    click.echo(report.to_text())
    click.echo()
    click.echo(f"each attention   at most {layers:.1e} of its largest output (tolerance {limit:g})")
    fine = not put_back and worst <= 10 * limit
    if worst == float("inf"):
        click.echo("whole model      NaN or infinities at other places, other integers, or other shapes")
    else:
        click.echo(f"whole model      {worst:.1e} of its largest output (tolerance {10 * limit:g})")
    click.echo("the outputs agree" if fine else "the outputs differ")
    return _required(report, require) if fine else 1


def _difference(a: Any, b: Any) -> float:
    """The largest difference of two outputs, relative to the largest finite magnitude of `a`.

    Infinite if one has NaN or an infinity where the other has not, or if shapes, dtypes, integers or plain
    values differ.
    """
    if not isinstance(a, torch.Tensor):
        is_plain = isinstance(a, (bool, int, float, str))
        return float("inf") if is_plain and a != b else 0.0
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    return difference_with_nan(a, b)


def _same(loaded: Loaded, args: Any, kwargs: Any) -> bool:
    """Whether these inputs have the values that the model was rewritten with."""
    pairs = zip(pytree.tree_leaves((loaded.args, loaded.kwargs)), pytree.tree_leaves((args, kwargs)), strict=False)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))


@app.command()
@SDK
def strategies(**given: Any) -> None:
    """List the strategies, and the rules by which policy "sdk" chooses one."""
    for strategy in FlashAttentionStrategy:
        click.echo(f"{strategy.value}  {strategy.name:<32} {STRATEGY_WORDS[strategy]}")
    click.echo(f"\nThe rules of SDK {given['sdk']}. The first that holds decides. Known releases: {', '.join(SDKS)}.")
    for rule in table(given["sdk"]):
        click.echo(f"  {rule.when:<60} {rule.strategy.name}")


STRATEGY_WORDS = {
    FlashAttentionStrategy.NONE: "the native operators of the model",
    FlashAttentionStrategy.UNSHARDED_KERNEL: "one kernel on one physical core (LNC 1)",
    FlashAttentionStrategy.SHARDED_KERNEL: "one kernel on the two physical cores of a logical NeuronCore (LNC 2)",
    FlashAttentionStrategy.CONTEXT_PARALLEL_KERNEL: "query rows are split over ranks in contiguous pieces",
    FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL: "query rows are split over ranks in strides",
    FlashAttentionStrategy.SLIDING_WINDOW_KERNEL: "a kernel that reads only the keys in a causal sliding window",
}


@app.command()
def kernels() -> None:
    """List the kernels: whether each is installed here, and which attentions it takes."""
    for name, kernel in KERNELS.items():
        if name in (OURS, PRIOR):
            state = "part of this package"
        elif name not in vendor.ADAPTERS:
            state = "in the SDK, never called"
        else:
            state = "installed" if vendor.find(name) else "in the SDK, not installed here"
        click.secho(name, bold=True, nl=False)
        click.echo(f"  ({state})")
        for clause in kernel.clauses:
            click.echo(f"    {_without_values(clause.demand)}  [{clause.code}]")
        for bridge in kernel.bridges:
            click.echo(f"    can do: {bridge.words}")


def _without_values(demand: str) -> str:
    """A demand without the parts that quote the values of one problem."""
    general = re.sub(r"[,;]? (and here|and the mask is|and is(?= {)|not on|not with|tolerances=)[^;]*", "", demand)
    return re.sub(r" ?\{[^}]*\}+", "", general)


@app.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def diff(old: Path, new: Path) -> int:
    """Compare two reports that `explain --json` wrote. Exit code 1 if they differ."""
    before, after = map(_read, (old, new))
    change = before.diff(after)
    click.echo(str(change))
    return 1 if change else 0


def _read(path: Path) -> RewriteReport:
    try:
        return RewriteReport.from_json(path.read_bytes())
    except RewriteError as error:
        raise type(error)(f"{path}: {error}") from error


@app.command()
@MODEL
@CONFIG
@click.option("--out", type=FILE, required=True, help="File for the times. Pass it as RewriteConfig(profile=...).")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Runs of each call.")
def profile(out: Path, repeats: int, **given: Any) -> None:
    """Time each kind of attention on the Neuron device of this machine, as a kernel and as native operators."""
    from neuron_attn_rewrite.cli.profiling import calls
    from neuron_attn_rewrite.strategy.profile import device, measure

    refuse_given("policy", "does not apply to profile: it times every attention that a kernel can compute.")
    device()
    report = _report({**given, "policy": "always"})
    config = config_of(given, False)
    count = measure(calls(report), str(out), target=config.target, cores=config.logical_cores, repeats=repeats)
    click.echo(f"wrote {count} times to {out}")


@app.command()
def doctor() -> int:
    """Check which parts of the Neuron stack are installed, and say what to do. Exit code 1 if something is wrong."""
    findings = diagnosis.examine()
    signs = {diagnosis.OK: ("+", "green"), diagnosis.NOTE: ("-", "yellow"), diagnosis.PROBLEM: ("!", "red")}
    for finding in findings:
        sign, color = signs[finding.state]
        click.secho(f"{sign} ", fg=color, bold=True, nl=False)
        click.echo(f"{finding.what:<36} {finding.found}")
        if finding.advice:
            click.echo(f"  {'':<36} -> {finding.advice}")
    return 1 if any(finding.state == diagnosis.PROBLEM for finding in findings) else 0


def _loaded(given: dict[str, Any], numbers: bool) -> Loaded:
    asked = asked_of(given, numbers)
    if numbers and not is_function(asked.model):
        with quiet():
            words = memory_note(asked)
        if words:
            note(words)
    with working(f"building {asked.model}"), quiet():
        loaded = load(asked)
    for text in loaded.notes:
        note(text)
    if not is_function(asked.model):
        kind = type(loaded.model).__name__
        if not {"input_ids", "decoder_input_ids"} & loaded.kwargs.keys():
            refuse_given("seq_len", f"does not apply to {kind}, whose input is no text.")
        if not ("input_ids" in loaded.kwargs and "attention_mask" in signature(loaded.model.forward).parameters):
            refuse_given("mask", f"does not apply to {kind}, which is called without an attention_mask.")
    return loaded


def _report(given: dict[str, Any]) -> RewriteReport:
    """What would be replaced. A small model that has no single graph is run once through torch.compile."""
    config, loaded = config_of(given, False), _loaded(given, numbers=False)
    kind = type(loaded.model).__name__
    with working(f"rewriting {kind}"), quiet(), _own_inputs(loaded):
        try:
            rewritten = rewrite(loaded.model, loaded.args, loaded.kwargs, config=config)
            report, read = rewritten.report, reads(loaded.model, rewritten)
        except CaptureError:
            if not loaded.is_small:
                raise
            report = explain_graphs(loaded.model, loaded.args, loaded.kwargs, config)
            read = runs(loaded.model, loaded.args, loaded.kwargs)
    for text in (*not_run(loaded.model, read), *unmatched_sites(report, config)):
        note(text)
    if not report.sites:
        note(f"no attention was found in {kind}.")
    return report


@contextmanager
def _own_inputs(loaded: Loaded) -> Iterator[None]:
    """Where inputs by convention do not work, say how to pass others."""
    try:
        yield
    except InputError as error:
        if not loaded.by_convention:
            raise
        raise InputError(f"{error} These were made by convention. To pass others, {OWN}") from error


def _dtype_of(loaded: Loaded) -> torch.dtype:
    return next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)
