"""The options that several commands share, and what the commands make of their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from neuron_attn_rewrite.cli.models import DTYPES, Asked, is_function
from neuron_attn_rewrite.config.options import KERNEL_NAMES, RewriteConfig, choices
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy

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


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (value or "").split(",") if name.strip())
    for name in names:
        if name not in KERNEL_NAMES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(KERNEL_NAMES)}.", context, parameter)
    return names


def _choice(name: str, **more: Any) -> Callable[[Command], Command]:
    """An option for a field of `RewriteConfig`, with the values and the default of the field."""
    values = [str(v) for v in choices()[name] if v is not None]
    default = getattr(RewriteConfig, name)
    return click.option(
        f"--{name}", type=click.Choice(values), default=default, show_default=default is not None, **more
    )


MODEL = _options(
    click.argument("model"),
    click.option("--size", type=click.Choice(["tiny", "full"]), help="[default: tiny for a model type, else full]"),
    click.option("--seq-len", type=click.IntRange(1), default=2048, show_default=True, help="Tokens in each text."),
    click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Batch size."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of the weights."),
    click.option("--attn", metavar="NAME", help="Attention implementation of transformers: eager, sdpa."),
    click.option("--mask/--no-mask", default=True, help="Give the model an attention_mask of ones, or none."),
    click.option("--part", metavar="NAME", help="Take only this part of the model, such as its vision_tower."),
    click.option(
        "--set",
        "changes",
        multiple=True,
        callback=_pairs,
        metavar="KEY=VALUE",
        help="Set a config field.",
    ),
)
SDK = _choice("sdk", help="Release of the Neuron SDK, which decides rules and kernels.")
CONFIG = _options(
    _choice("target", help="Hardware to rewrite for."),
    _choice("lnc", help="Physical cores in a logical NeuronCore."),
    _choice("policy", help="How to decide between a kernel and the native operators."),
    SDK,
    click.option(
        "--strategy", type=click.Choice(list(FlashAttentionStrategy.__members__)), help="Force one on every attention."
    ),
    click.option("--kernels", callback=_names, metavar="NAME,...", help="Take only these: see the command kernels."),
    click.option(
        "--sites",
        multiple=True,
        callback=_pairs,
        metavar="PATTERN=WISH",
        help="A strategy or kernel for the attentions whose module path matches. Repeat it for more.",
    ),
    _choice("weights", help='If the weights are read too: "beside" replaces the attention and keeps the softmax.'),
    click.option("--gradients/--no-gradients", default=None, help="Whether gradients will be taken."),
    _choice("padding", help='"right" promises that every batch is padded on the right.'),
    _choice("empty_rows", help='"any" allows any output for a query that sees no key.'),
)


class _Output(click.Path):
    """A file to write. A missing directory is an error before the work starts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"the directory {str(path.parent)!r} does not exist.", param, ctx)
        return path


FILE = _Output(dir_okay=False, writable=True)
OUTPUT = _Output(dir_okay=False, writable=True, allow_dash=True)
"""A file to write, or `STDOUT`."""
STDOUT = Path("-")
"""The file name that stands for standard output."""


class _Count(click.ParamType):  # type: ignore[type-arg]
    """A number of attentions, or "all"."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "all" or str(value).isdigit():
            return value if value == "all" else int(value)
        return self.fail(f'{value!r} is neither a number nor "all".', param, ctx)


REQUIRE = click.option("--require", type=_Count(), help="Exit code 1 unless so many attentions are replaced.")


def config_of(given: Mapping[str, Any], verify: bool) -> RewriteConfig:
    """The configuration that the options `CONFIG` ask for."""
    lnc: Any = int(given["lnc"]) if given["lnc"] else None
    names = ("target", "policy", "sdk", "padding", "empty_rows", "kernels", "weights", "gradients")
    strategies = FlashAttentionStrategy.__members__
    return RewriteConfig(
        lnc=lnc,
        verify=verify,
        strategy=strategies.get(given["strategy"]),
        sites={pattern: strategies.get(wish, wish) for pattern, wish in given["sites"]},
        **{name: given[name] for name in names},
    )


def refuse_given(name: str, why: str) -> None:
    """Refuse an option that the command line gives although it does not apply.

    Raises:
        click.UsageError: it is given.
    """
    context = click.get_current_context()
    if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
        option = next(p for p in context.command.params if p.name == name)
        used = option.secondary_opts[0] if option.secondary_opts and not context.params[name] else option.opts[0]
        raise click.UsageError(f"{used} {why}", context)


def asked_of(given: Mapping[str, Any], numbers: bool) -> Asked:
    """The model that the options `MODEL` ask for.

    Raises:
        click.UsageError: MODEL is a function in a file, and an option is for other models.
    """
    names = ("model", "size", "seq_len", "batch", "dtype", "attn", "mask", "changes", "part")
    context = click.get_current_context()
    if is_function(given["model"]):
        for parameter in context.command.params:
            if parameter.name in names[1:]:
                why = "does not apply to a function in a file: it makes the model and its inputs."
                refuse_given(str(parameter.name), why)
    return Asked(**{name: given[name] for name in names}, numbers=numbers)
