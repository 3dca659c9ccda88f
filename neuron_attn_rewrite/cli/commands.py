"""The commands. Each ends in an exit code: 0 is fine, 1 a finding (a difference, a failed check), 2 an error."""

from __future__ import annotations

import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import click
import torch

from neuron_attn_rewrite.backends.compile import explain_graphs
from neuron_attn_rewrite.cli import doctor as diagnosis
from neuron_attn_rewrite.cli.models import DTYPES, Asked, Loaded, load
from neuron_attn_rewrite.config.options import CHOICES, RewriteConfig
from neuron_attn_rewrite.config.rules import SDKS
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.errors import CaptureError, RewriteError
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.report.model import RewriteReport
from neuron_attn_rewrite.rewriter import rewrite
from neuron_attn_rewrite.strategy.legality import KERNELS, OURS
from neuron_attn_rewrite.strategy.tables import table

NAME = "neuron-attn-rewrite"


def run(arguments: Sequence[str] | None) -> int:
    """The exit code of a command line. An error is one line; `--debug` adds the traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        result = app.main([a for a in given if a != "--debug"], prog_name=NAME, standalone_mode=False)
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
  {NAME} verify bert --seq-len 512
  {NAME} diff before.json after.json

Shell completion: eval "$(_NEURON_ATTN_REWRITE_COMPLETE=bash_source {NAME})", or zsh_source, fish_source."""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="neuron-attn-rewrite", prog_name=NAME)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def app(debug: bool) -> None:
    """Rewrites the attention of PyTorch models into NKI flash attention kernels, where it can be proven equal."""


Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _pairs(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[tuple[str, str]]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE.", context, parameter)
    return [(name, text) for name, _, text in (value.partition("=") for value in values)]


def _choice(name: str, **more: Any) -> Callable[[Command], Command]:
    """An option for a field of `RewriteConfig`, with the values and the default that are there."""
    values = [str(v) for v in CHOICES[name] if v is not None]
    default = getattr(RewriteConfig, name)
    return click.option(
        f"--{name}", type=click.Choice(values), default=default, show_default=default is not None, **more
    )


MODEL = _options(
    click.argument("model"),
    click.option("--size", type=click.Choice(["tiny", "full"]), help="[default: tiny for a model type, else full]"),
    click.option("--seq-len", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of each input."),
    click.option("--batch", type=click.IntRange(1), default=1, show_default=True),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True),
    click.option("--attn", metavar="NAME", help="Attention implementation of transformers: eager, sdpa."),
    click.option("--mask/--no-mask", default=True, help="Whether an attention_mask is among the inputs."),
    click.option("--part", metavar="NAME", help="Only this part of the model, such as its vision_tower."),
    click.option("--set", "changes", multiple=True, callback=_pairs, metavar="KEY=VALUE", help="Change the config."),
)
CONFIG = _options(
    _choice("target", help="Hardware."),
    _choice("lnc", help="Physical cores in a logical NeuronCore."),
    _choice("policy", help="When a kernel is taken."),
    _choice("sdk", help="Release of the SDK whose rules and kernels are meant."),
    _choice("padding", help='"right" promises padding on the right.'),
    _choice("empty_rows", help='"any" says that rows which see no key don\'t matter.'),
)


class _Output(click.Path):
    """A file that can be written, which is known before the work and not after it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"the directory {str(path.parent)!r} does not exist.", param, ctx)
        return path


OUTPUT = _Output(dir_okay=False, writable=True)


@app.command(
    epilog=f"""\b
MODEL is
  a model type             llama        built tiny, or as large as the real one with --size full
  a directory              ./my-model   its config.json decides; weights are not read
  a config                 config.json
  a function in a file     model.py:make   gives (model, inputs)

\b
Examples:
  {NAME} explain llama --size full --seq-len 8192 --html report.html
  {NAME} explain mistral --set sliding_window=1024 --attn eager
  {NAME} explain llava --part vision_tower
  {NAME} explain bert --policy always --no-mask"""
)
@MODEL
@CONFIG
@click.option("--html", type=OUTPUT, help="Write the report as a page.")
@click.option("--json", type=OUTPUT, help="Write the report as JSON.")
@click.option("--markdown", type=OUTPUT, help="Write the report as Markdown.")
@click.option("--dot", type=OUTPUT, help="Write before and after as a graph for Graphviz.")
@click.option(
    "--reproducer", "site", metavar="SITE", help="Print a script that rebuilds one attention, not the report."
)
def explain(
    html: Path | None, json: Path | None, markdown: Path | None, dot: Path | None, site: str | None, **given: Any
) -> None:
    """Say what would be replaced, by what, and why. Weights need no values, so a model of any size will do."""
    report = _report(given)
    for path, text in (
        (html, report.to_html),
        (json, report.to_json),
        (markdown, report.to_markdown),
        (dot, report.to_dot),
    ):
        if path is not None:
            path.write_text(text(), encoding="utf-8")
            click.echo(f"wrote {path}", err=True)
    if site is not None:
        click.echo(report.reproducer(int(site) if site.lstrip("-").isdigit() else site), nl=False)
    else:
        click.echo(report.to_text())


@app.command(
    epilog=f"""\b
Examples:
  {NAME} verify llama
  {NAME} verify ./my-model --dtype fp32    with the weights of the directory"""
)
@MODEL
@CONFIG
def verify(**given: Any) -> int:
    """Rewrite, run both models on fresh inputs, and compare. Exit code 1 if they differ by more than the tolerance."""
    config, loaded = _config(given, True), _loaded(given, numbers=True)
    with _working(f"rewriting {type(loaded.model).__name__}"), _quiet():
        rewritten = rewrite(loaded.model, loaded.args, loaded.kwargs, config=config)
    report, limit = rewritten.report, config.tolerance(_dtype_of(loaded))
    with torch.no_grad(), _working("running both models"):
        old, new = (
            torch.utils._pytree.tree_leaves(m(*loaded.args, **loaded.kwargs)) for m in (loaded.model, rewritten)
        )
    worst = 0.0
    for a, b in zip(old, new, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel():
            scale = a.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            worst = max(worst, float((a.double() - b.double()).abs().max() / scale))
    layers = max((s.max_error for s in report.sites if s.max_error is not None), default=0.0)
    put_back = [s for s in report.kept if any(r.code == "put-back" for r in s.reasons)]
    click.echo(report.to_text())
    click.echo()
    click.echo(f"each attention   {layers:.1e} of its largest output, at most (tolerance {limit:g})")
    click.echo(f"whole model      {worst:.1e} of its largest output")
    fine = not put_back and worst <= 10 * limit
    click.echo("they agree" if fine else "they differ")
    return 0 if fine else 1


@app.command()
@CONFIG
def strategies(**given: Any) -> None:
    """The strategies, and the rule table by which policy "sdk" picks one."""
    for strategy in FlashAttentionStrategy:
        click.echo(f"{strategy.value}  {strategy.name:<32} {STRATEGY_WORDS[strategy]}")
    click.echo(f"\nThe rules of SDK {given['sdk']} (the first that holds decides; the releases are {', '.join(SDKS)}):")
    for rule in table(given["sdk"]):
        click.echo(f"  {rule.when:<60} {rule.strategy.name}")


STRATEGY_WORDS = {
    FlashAttentionStrategy.NONE: "the native operators, left as they were",
    FlashAttentionStrategy.UNSHARDED_KERNEL: "one kernel on one physical core (LNC 1)",
    FlashAttentionStrategy.SHARDED_KERNEL: "one kernel over the two cores of a logical NeuronCore (LNC 2)",
    FlashAttentionStrategy.CONTEXT_PARALLEL_KERNEL: "query rows split over ranks in contiguous pieces",
    FlashAttentionStrategy.STRIDED_CONTEXT_PARALLEL_KERNEL: "query rows split over ranks in strides",
    FlashAttentionStrategy.SLIDING_WINDOW_KERNEL: "a kernel that reads only the keys of a causal window",
}


@app.command()
def kernels() -> None:
    """The kernels: which are installed here, and what each demands of an attention."""
    for name, kernel in KERNELS.items():
        if name == OURS:
            state = "part of this package"
        elif name not in vendor.ADAPTERS:
            state = "of the SDK, never called"
        else:
            state = "installed" if vendor.find(name) else "of the SDK, not installed here"
        click.secho(name, bold=True, nl=False)
        click.echo(f"  ({state})")
        for clause in kernel.clauses:
            click.echo(f"    {_plain(clause.demand)}  [{clause.code}]")
        for bridge in kernel.bridges:
            click.echo(f"    can do: {bridge.words}")


def _plain(demand: str) -> str:
    """A demand without what it says of one problem."""
    general = re.sub(r"[,;]? (and here|and the mask is|and is(?= {)|not on|not with|tolerances=)[^;]*", "", demand)
    return re.sub(r" ?\{[^}]*\}+", "", general)


@app.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def diff(old: Path, new: Path) -> int:
    """What changed between two reports that `explain --json` wrote. Exit code 1 if something did."""
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
@click.option("--out", type=OUTPUT, required=True, help="Where the times are written, for RewriteConfig(profile=...).")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
def profile(out: Path, repeats: int, **given: Any) -> None:
    """Time each kind of attention of a model on this machine's Neuron device, as kernel and as native operators."""
    from neuron_attn_rewrite.cli.profiling import calls
    from neuron_attn_rewrite.strategy.profile import device, measure

    device()
    report = _report({**given, "policy": "always"})
    config = _config(given, False)
    count = measure(calls(report), str(out), target=config.target, cores=config.logical_cores, repeats=repeats)
    click.echo(f"wrote {count} times to {out}")


@app.command()
def doctor() -> int:
    """What of the Neuron stack is here, in which versions, and what to do. Exit code 1 if something is wrong."""
    findings = diagnosis.examine()
    signs = {diagnosis.OK: ("+", "green"), diagnosis.NOTE: ("-", "yellow"), diagnosis.PROBLEM: ("!", "red")}
    for finding in findings:
        sign, color = signs[finding.state]
        click.secho(f"{sign} ", fg=color, bold=True, nl=False)
        click.echo(f"{finding.what:<36} {finding.found}")
        if finding.advice:
            click.echo(f"  {'':<36} -> {finding.advice}")
    return 1 if any(finding.state == diagnosis.PROBLEM for finding in findings) else 0


def _config(given: dict[str, Any], verify: bool) -> RewriteConfig:
    lnc = given["lnc"]
    names = ("target", "policy", "sdk", "padding", "empty_rows")
    return RewriteConfig(lnc=int(lnc) if lnc else None, verify=verify, **{name: given[name] for name in names})


def _loaded(given: dict[str, Any], numbers: bool) -> Loaded:
    names = ("model", "size", "seq_len", "batch", "dtype", "attn", "mask", "changes", "part")
    asked = Asked(**{name: given[name] for name in names}, numbers=numbers)
    with _working(f"building {asked.model}"), _quiet():
        loaded = load(asked)
    for note in loaded.notes:
        _note(note)
    return loaded


def _report(given: dict[str, Any]) -> RewriteReport:
    """What would be replaced; of a small model that is no single graph, by running it."""
    config, loaded = _config(given, False), _loaded(given, numbers=False)
    kind = type(loaded.model).__name__
    with _working(f"rewriting {kind}"), _quiet():
        try:
            report = rewrite(loaded.model, loaded.args, loaded.kwargs, config=config).report
        except CaptureError:
            if not loaded.is_small:
                raise
            report = explain_graphs(loaded.model, loaded.args, loaded.kwargs, config)
    if not report.sites:
        _note(f"{kind} has no attention that is found.")
    return report


def _note(words: str) -> None:
    click.echo(f"note: {words}", err=True)


def _dtype_of(loaded: Loaded) -> torch.dtype:
    return next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def _working(words: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(f"{words} ..."):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that libraries give while a model is built, and the traces of attempts to capture it."""
    import logging

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with redirect_stderr(io.StringIO()):
                yield
        finally:
            logging.disable(before)
