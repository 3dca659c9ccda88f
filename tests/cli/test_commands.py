"""The command line: what each command prints and returns, and one line for each way to get it wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import time
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from neuron_attn_rewrite import RewriteConfig, RewriteReport, cli, rewrite
from neuron_attn_rewrite.cli import commands, doctor, progress
from neuron_attn_rewrite.cli.build import Weightless, give_stand_ins
from neuron_attn_rewrite.cli.commands import run
from neuron_attn_rewrite.cli.models import Asked, load
from neuron_attn_rewrite.cli.parts import not_run, reads, runs
from neuron_attn_rewrite.config.strategies import FlashAttentionStrategy
from neuron_attn_rewrite.kernels import vendor
from neuron_attn_rewrite.strategy import profile
from neuron_attn_rewrite.strategy.legality import KERNELS

IS_5 = transformers.__version__ >= "5"
SHORT = ["--seq-len", "32", "--policy", "always"]
MODEL_FILE = """
import torch
import transformers
from torch import nn

class Attention(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

def make():
    return Attention(), tuple(torch.randn(1, 2, 16, 8) for _ in range(3))

def by_name():
    return Attention(), {n: torch.randn(1, 2, 16, 8) for n in ("query", "key", "value")}

class Branch(nn.Module):
    def forward(self, query):
        return query if query.sum() > 0 else -query

def branches():
    return Branch(), torch.randn(3)

def wrong():
    return Attention()

def plain():
    return nn.Identity(), torch.randn(3)

def fails():
    return {}["nothing"]
"""
SMALL_CONFIG = """{"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32,
"num_hidden_layers": 1, "vocab_size": 64}"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "made.py"
    path.write_text(MODEL_FILE, encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no line says that work goes on."""
    monkeypatch.setattr(progress, "PATIENCE", 1e6)


def test_explain_writes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms = {"--html": "r.html", "--json": "r.json", "--markdown": "r.md", "--dot": "r.dot"}
    options = [part for name, file in forms.items() for part in (name, str(tmp_path / file))]
    assert run(["explain", "llama", *SHORT, "--dtype", "fp32", *options]) == 0
    printed = capsys.readouterr()
    assert "2 of 2 attentions replaced" in printed.out and "model.layers.[0-1].self_attn" in printed.out
    assert printed.err.count("wrote ") == 4
    report = RewriteReport.from_json((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert str(report) == printed.out.rstrip("\n")
    assert report.sites[0].q_len == 32 and report.sites[0].max_error is None
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report.to_html()


@pytest.mark.parametrize("name", ["make", "by_name"])
def test_a_function_in_a_file(file: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", f"{file}:{name}", "--policy", "always"]) == 0
    assert "1 of 1 attentions replaced" in capsys.readouterr().out


def test_a_directory_and_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config keeps its sizes, and the weights that lie beside it are those that are verified."""
    model = load(Asked("llama", dtype="fp32", seq_len=32, numbers=True)).model
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = load(Asked(str(tmp_path), dtype="fp32", seq_len=32, numbers=True)).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for place in (tmp_path, tmp_path / "config.json"):
        assert run(["explain", str(place), *SHORT, "--attn", "eager", "--set", "num_hidden_layers=1"]) == 0
        out = capsys.readouterr().out
        assert "1 of 1" in out and "query [1, 4, 32, 16]" in out and "matmul >" in out


def test_verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", "bert", *SHORT, "--dtype", "fp32", "--attn", "eager"]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "the outputs agree" in out and "2 of 2" in out
    monkeypatch.setattr(RewriteConfig, "tolerance", lambda self, dtype: 1e-12)
    assert run(arguments) == 1
    out = capsys.readouterr().out
    assert "the outputs differ" in out and "put-back" in out


OTHER_OUTPUTS = """
import torch
import transformers
from torch import nn

class M(nn.Module):
    def forward(self, q):
        o = nn.functional.scaled_dot_product_attention(q, q, q)
        first = torch.where(o[..., :1].isnan() | True, torch.nan, o[..., :1])
        return torch.cat([first, o + torch.randn(())], -1)

def make():
    return M(), torch.randn(1, 2, 64, 16)

X = torch.randn(1, 2, 64, 16)

def fixed():
    return Same(), X

class Picks(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q), torch.randint(2**30, (8,))

def picks():
    return Picks(), torch.randn(1, 2, 64, 16)

class Same(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(q, q, q) / torch.tensor([0.0, 1.0]).repeat(8)
"""


def test_verify_looks_beside_a_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.py"
    file.write_text(OTHER_OUTPUTS, encoding="utf-8")
    for function in ("make", "picks"):
        assert run(["verify", f"{file}:{function}", "--policy", "always"]) == 1
        assert "the outputs differ" in capsys.readouterr().out
    file.write_text(OTHER_OUTPUTS.replace("X = ", "torch.manual_seed(0); X = "), encoding="utf-8")
    assert run(["verify", f"{file}:fixed", "--policy", "always"]) == 0
    printed = capsys.readouterr()
    assert "the outputs agree" in printed.out and "the same inputs each time" in printed.err


def test_verify_of_nothing_is_no_agreement(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", f"{file}:make"]) == 1
    out = capsys.readouterr().out
    assert "nothing was replaced" in out and "--policy always" in out and "agree" not in out


def test_fresh_inputs_are_others_with_padding() -> None:
    loaded = load(Asked("bert", seq_len=32, batch=2))
    assert loaded.fresh is not None
    _, fresh = loaded.fresh()
    assert not torch.equal(fresh["input_ids"], loaded.kwargs["input_ids"])
    assert loaded.kwargs["attention_mask"].all() and fresh["attention_mask"].sum() == 60


def test_json_on_standard_output(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", f"{file}:make", "--policy", "always", "--json", "-", "--require", "all"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["replaced"] == 1 and "1 of 1 attentions replaced" in printed.err


@pytest.mark.parametrize(("require", "code"), [("all", 0), ("1", 0), ("2", 1), ("0", 1)])
def test_require(require: str, code: int, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("explain", "verify"):
        assert run([command, f"{file}:make", "--policy", "always", "--require", require]) == code
        printed = capsys.readouterr()
        assert "1 of 1 attentions replaced" in printed.out
        assert (f"not met: --require {require}, but 1 of 1" in printed.err) == bool(code)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strategy", "UNSHARDED_KERNEL", "--lnc", "1"], "flash_fwd (UNSHARDED_KERNEL)"),
        (["--sites", "*=NONE"], "native (NONE)"),
        (["--sites", "*=flash_fwd", "--kernels", "flash_fwd,attention_cte"], "flash_fwd is set for this site"),
        (["--policy", "always", "--gradients", "--weights", "beside"], "becomes   flash_fwd"),
    ],
)
def test_options_of_the_configuration(
    options: list[str], words: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["explain", f"{file}:make", *options]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_a_pattern_that_no_attention_has_is_noted(command: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, f"{file}:make", "--policy", "always", "--sites", "nothing*=NONE"]) == 0
    assert "note: " in (err := capsys.readouterr().err) and "nothing*" in err


def test_long_work_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress.working("building llama"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "building llama ...\n"


def test_diff(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert run(["explain", f"{file}:make", "--policy", "always", "--json", before]) == 0
    assert run(["explain", f"{file}:make", "--policy", "sdk", "--lnc", "1", "--json", after]) == 0
    capsys.readouterr()
    assert run(["diff", before, before]) == 0 and capsys.readouterr().out == "no change\n"
    assert run(["diff", before, after]) == 1
    assert "kernel flash_fwd -> native" in capsys.readouterr().out


def test_the_reproducer(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for site in ("0", "scaled_dot_product_attention"):
        assert run(["explain", f"{file}:make", "--policy", "always", "--reproducer", site]) == 0
        assert compile(capsys.readouterr().out, "script", "exec")


def test_strategies_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["strategies"]) == 0
    out = capsys.readouterr().out
    assert all(strategy.name in out for strategy in FlashAttentionStrategy) and "LNC 1, q_len >= 4096" in out
    assert run(["kernels"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in KERNELS) and "{" not in out and "not installed here" in out
    # Of a demand, what it says of one problem is left out whole.
    assert not re.search(r"(and is|[,;])  \[", out)


def test_profile_needs_a_device(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", f"{file}:make", "--out", str(tmp_path / "times.json")]) == 2
    assert "No Neuron device" in capsys.readouterr().err and not (tmp_path / "times.json").exists()


def test_profile_times_each_kind_as_kernel_and_as_it_was(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the CPU in the place of the device: every call is made and can be run."""
    ran: list[Any] = []
    monkeypatch.setattr(profile, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(profile, "_median_micros", lambda call, repeats: float(len(ran)) if ran.append(call()) else 7.0)
    path = tmp_path / "times.json"
    assert run(["profile", f"{file}:make", "--out", str(path)]) == 0
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    assert [(e["kernel"], e["target"], e["cores"]) for e in entries] == [
        ("native", "trn2", 2),
        ("flash_fwd", "trn2", 2),
    ]
    assert len(ran) == 2 and len({e["problem"] for e in entries}) == 1
    problem = rewrite(*_made(file), config=RewriteConfig(profile=str(path))).report.sites[0]
    assert "measure" in problem.reasons[-1], problem.reasons


def _made(file: str) -> tuple[nn.Module, tuple[Any, ...]]:
    loaded = load(Asked(f"{file}:make"))
    return loaded.model, loaded.args


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "lama"], "did you mean llama"),
        (["explain", "zzzz"], "give a model type such as"),
        (["explain", "nothing.py:make"], "is not a file"),
        (["explain", "FILE:nothing"], "has no function 'nothing'"),
        (["explain", "FILE:wrong"], "must return (model, inputs)"),
        (["explain", "FILE:branches"], "could not be captured as one graph"),
        (["explain", "DIRECTORY"], "has no config.json"),
        (["explain", "nothing.json"], "is not a file, a directory or a model type"),
        (["explain", "llama", "--set", "hidden"], "is not KEY=VALUE"),
        (["explain", "llama", "--set", "hiden_size=4"], "did you mean hidden_size"),
        (["explain", "llama", "--attn", "nothing"], "transformers can't build llama"),
        (["explain", "llama", "--target", "trn9"], "--target"),
        (["explain", "llama", "--lnc", "2", "--target", "trn1"], "lnc=2 needs one of"),
        (["explain", "llama", "--seq-len", "0"], "--seq-len"),
        (["explain", "patchtst"], "file.py:function"),
        (["explain", "FILE:make", "--reproducer", "nothing"], "no site 'nothing'"),
        (["explain", "FILE:make", "--html", "DIRECTORY/none/r.html"], "does not exist"),
        (["explain", "FILE"], "made.py:make"),
        (["explain", "FILE:fails"], "made.py:fails fails: KeyError"),
        (["explain", "DIRECTORY/../wrong.json"], "/wrong.json"),
        (["explain", "DIRECTORY/../part.json"], "not a valid JSON file"),
        (["verify", "DIRECTORY/../cut", "--seq-len", "8"], "transformers can't build"),
        (["explain", "llava", "--part", "vison"], "The parts with inputs of their own are "),
        (["diff", "FILE", "FILE"], "made.py: this is not JSON"),
        (["diff", "nothing.json", "nothing.json"], "does not exist"),
        (["nothing"], "No such command"),
        (["explain", "BERT"], "did you mean bert"),
        (["explain", "meta-llama/Llama-3.1-8B"], "a model of the Hugging Face Hub"),
        (["explain", "FILE:make", "--seq-len", "8"], "--seq-len does not apply to a function in a file"),
        (["verify", "FILE:make", "--size", "tiny"], "--size does not apply to a function in a file"),
        (["explain", "FILE:make", "--json", "-", "--html", "-"], "only one form"),
        (["explain", "FILE:make", "--require", "some"], 'neither a number nor "all"'),
        (["explain", "FILE:make", "--kernels", "flash"], "is not one of flash_fwd"),
        (["explain", "FILE:make", "--sites", "flash_fwd"], "is not KEY=VALUE"),
        (["explain", "FILE:make", "--sites", "*=flash"], "RewriteConfig.sites"),
        (["explain", "FILE:make", "--strategy", "FAST"], "--strategy"),
        (["verify", "llama", "--size", "full", "--set", "hidden_size=65536"], "and this machine has"),
        (["strategies", "--target", "trn1"], "No such option"),
        (["explain", ""], "MODEL is empty"),
        *([(["explain", "bert", "--set", "hidden_size=abc"], "--set hidden_size=abc: ")] if IS_5 else ()),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str], words: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "wrong.json").write_text('{"model_type": "bert", "hidden_size": "abc"}', encoding="utf-8")
    (tmp_path / "part.json").write_text('{"model_type": ', encoding="utf-8")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text(SMALL_CONFIG, encoding="utf-8")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut short")
    given = [a.replace("FILE", file).replace("DIRECTORY", str(empty)) for a in arguments]
    assert run(given) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error: "), printed.err
    assert printed.err.count("\n") == 1 and not printed.out


def test_a_model_type_needs_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(["explain", "llama"]) == 2
    assert capsys.readouterr().err == "error: a model type or a config needs transformers: pip install transformers\n"


def test_notes(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field that looks like a slip, a tower that sees no input, and a model without attention."""
    path = tmp_path / "config.json"
    path.write_text(SMALL_CONFIG.replace("layers", "layer"), encoding="utf-8")
    (note,) = load(Asked(str(path), seq_len=8, size="tiny")).notes
    assert "has 'num_hidden_layer', but a config of bert has no such field: did you mean 'num_hidden_layers'?" in note
    path.write_text(SMALL_CONFIG, encoding="utf-8")
    assert not load(Asked(str(path), seq_len=8)).notes
    assert run(["explain", f"{file}:plain"]) == 0
    assert capsys.readouterr().err == "note: no attention was found in Identity.\n"


@pytest.mark.parametrize(
    ("name", "tower"), [("llava", "vision_tower"), ("qwen2_vl", "visual"), ("qwen2_audio", "audio_tower")]
)
def test_a_tower_that_sees_no_input_is_a_part(name: str, tower: str, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"note: these inputs do not run {tower}: the report does not cover it. --part {tower} explains it.\n"
    assert run(["explain", name, "--policy", "always", "--seq-len", "32"]) == 0
    assert capsys.readouterr().err == note
    assert run(["verify", name, "--policy", "always", "--seq-len", "32", "--dtype", "fp32"]) == 0
    assert note in capsys.readouterr().err
    assert run(["explain", name, "--policy", "always", "--part", tower]) == 0
    printed = capsys.readouterr()
    assert re.match(r"(\d+) of \1 attentions replaced", printed.out) and not printed.err, printed


def test_every_part_without_input_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Of mllama: the vision tower, and the layers that attend to it."""
    assert run(["explain", "mllama", *SHORT]) == 0
    printed = capsys.readouterr()
    assert "do not run language_model.layers.1: " in printed.err and "--part vision_model" in printed.err, printed
    assert "1 of 1 attentions replaced" in printed.out


@pytest.mark.parametrize(
    ("words", "out", "err"),
    [
        ("sam --seq-len 2048", "", "--seq-len does not apply to SamModel, whose input is no text."),
        ("encodec", "0 of 0", "no attention was found in EncodecModel"),
        ("blip-2 --seq-len 64", " attentions replaced", ""),
        (
            "musicgen --seq-len 32",
            *((" attentions replaced", "") if IS_5 else ("", "has no default config of musicgen")),
        ),
        ("qwen2_5_vl --seq-len 32", "2 of 2", "--part visual"),
        ("qwen2_5_omni", "", "computes nothing itself: take one of its parts with --part. They are thinker, "),
        ("perceiver", "", "no inputs are known for PerceiverModel, which needs inputs: write a function"),
    ],
)
def test_model_types_work_or_say_why_not(words: str, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["explain", *words.split(), "--policy", "always"])
    printed = capsys.readouterr()
    assert code == (0 if out else 2) and out in printed.out and err in printed.err, printed
    assert not printed.out if code else printed.err.startswith("note: ") or not printed.err, printed


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_timm_available", lambda: False)
    monkeypatch.setitem(
        transformers.utils.import_utils.BACKENDS_MAPPING,
        "timm",
        (lambda: False, transformers.utils.import_utils.TIMM_IMPORT_ERROR),
    )
    assert run(["explain", "detr"]) == 2
    assert capsys.readouterr().err == "error: transformers can't build detr: it needs timm: pip install timm\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "lama", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--debug"], ["--help"], ["explain", "--help"], ["verify", "-h"]):
        assert run(arguments) == 0
        assert "Examples:" in capsys.readouterr().out


def test_without_the_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert left.value.code == 2
    assert capsys.readouterr().err.strip() == "neuron-attn-rewrite needs more packages: pip install click jinja2 rich"


def test_the_core_imports_none_of_the_extras_and_the_module_runs() -> None:
    """In a fresh process, in which every extra is barred."""
    script = """
        import runpy, sys
        for name in ("click", "rich", "jinja2", "transformers", "jsonschema", "torch_xla"):
            sys.modules[name] = None
        import torch
        import neuron_attn_rewrite as nar
        q = torch.randn(1, 1, 8, 8)
        class M(torch.nn.Module):
            def forward(self, q, k, v):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        report = nar.rewrite(M(), (q, q.clone(), q.clone()), config=nar.RewriteConfig(policy="always")).report
        assert len(report.replaced) == 1 and report.to_text() and report.to_json() and report.to_dot()
        sys.argv = ["x", "doctor"]
        runpy.run_module("neuron_attn_rewrite", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install click" in done.stderr, done.stderr


# Models


def test_full_size_takes_no_memory_and_proves_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of the real width: 3.9 billion parameters, none of them held; masks in buffers keep their values."""
    loaded = load(Asked("llama", size="full", seq_len=64, changes=[("num_hidden_layers", "2")]))
    parameters = list(loaded.model.parameters())
    assert sum(p.numel() for p in parameters) > 3.5e9
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
    assert sum(storages.values()) < 1.01 * max(p.nbytes for p in parameters)
    assert all(p.is_contiguous() for p in parameters)  # grouped products refuse strides of 0
    assert run(["explain", "llama", "--size", "full", *SHORT, "--set", "num_hidden_layers=1", "--attn", "eager"]) == 0
    out = capsys.readouterr().out
    assert "query [1, 64, 32, 128], key [1, 8, 32, 128]" in out and "causal(offset=0) & key_padding" in out


class Masked(nn.Module):
    """Its mask is a buffer, its bias a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("visible", torch.ones(8, 8, dtype=torch.bool).tril())
        self.bias = nn.Parameter(torch.empty(8, 8))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) + self.bias
        return scores.masked_fill(~self.visible, torch.finfo(scores.dtype).min).softmax(-1) @ value


def test_what_has_no_values_is_never_read_by_a_proof() -> None:
    """A mask that is held is proven; one on the meta device is an operand, and the numbers are not compared."""
    always = RewriteConfig(policy="always")
    query, key, value = (torch.randn(1, 2, 8, 8) for _ in range(3))
    with Weightless():
        model = Masked()
    assert model.bias.is_meta and not model.visible.is_meta
    give_stand_ins(model)
    (site,) = rewrite(model, (query, key, value), config=RewriteConfig(policy="always", verify=False)).report.sites
    assert str(site.mask) == "causal(offset=0)" and site.bias == (1, 1, 8, 8)
    everywhere = Masked().to("meta")
    meta = [x.to("meta") for x in (query, key, value)]
    (site,) = rewrite(everywhere, tuple(meta), config=always).report.sites
    assert str(site.mask) != "causal(offset=0)" and site.max_error is None
    give_stand_ins(everywhere)
    assert isinstance(everywhere.visible, nn.Parameter)


@pytest.mark.parametrize(
    ("name", "attentions"),
    [("vit", 2), ("whisper", 6), ("t5", 6), ("clip", 4), ("gemma2", 2), ("gemma3", 2)],
)
def test_inputs_by_convention(name: str, attentions: int) -> None:
    loaded = load(Asked(name, seq_len=32, dtype="fp32", batch=2))
    report = rewrite(loaded.model, (), loaded.kwargs, config=RewriteConfig(policy="always", verify=False)).report
    assert len(report.sites) == attentions, report
    assert {site.batch for site in report.sites} <= {2}


def test_tiny_heads_of_a_latent_fit() -> None:
    dense = [("first_k_dense_replace", "2")]  # experts can't be captured as one graph with every transformers
    loaded = load(Asked("deepseek_v3", seq_len=32, dtype="fp32", changes=dense))
    report = rewrite(loaded.model, (), loaded.kwargs, config=RewriteConfig(policy="always", verify=False)).report
    assert [site.head_dim for site in report.sites] == [32, 32]


# The doctor


def test_doctor_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    states = {finding.what: finding.state for finding in doctor.examine()}
    assert states["torch"] == doctor.OK and states["python"] == doctor.OK
    assert set(states) >= {f"kernel {name}" for name in vendor.ADAPTERS}
    code = run(["doctor"])
    assert code == (doctor.PROBLEM in states.values())
    assert torch.__version__.split("+")[0] in capsys.readouterr().out


@pytest.mark.parametrize(("size", "placeholder"), [(0, True), (40, True), (5000, False)])
def test_doctor_knows_empty_placeholders(
    size: int, placeholder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A distribution with the right name, and a module that is missing, almost empty, or real."""
    about = tmp_path / "torch_neuronx-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-neuronx\nVersion: 0.0.1\n", encoding="utf-8")
    module = tmp_path / "torch_neuronx"
    record = "torch_neuronx-0.0.1.dist-info/METADATA,,\n"
    if size:
        module.mkdir()
        (module / "__init__.py").write_text("#" * size, encoding="utf-8")
        record += "torch_neuronx/__init__.py,,\n"
    (about / "RECORD").write_text(record, encoding="utf-8")
    found = Distribution.at(about)
    assert doctor.is_placeholder(found, "torch_neuronx") == placeholder
    monkeypatch.setattr(doctor, "_distribution", lambda name: found if name == "torch-neuronx" else None)
    monkeypatch.setattr(doctor, "CHECKS", (doctor._neuron,))
    assert run(["doctor"]) == int(placeholder)
    out = capsys.readouterr().out
    assert ("empty placeholder" in out) == placeholder
    assert "the Neuron package repository" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("explain vit --seq-len 64", "--seq-len does not apply to ViTModel"),
        ("explain vit --no-mask", "--no-mask does not apply to ViTModel"),
        ("profile bert --policy sdk --out times.json", "--policy does not apply to profile"),
    ],
)
def test_options_for_text_are_refused_without_text(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run(words.split()) == 2
    assert message in capsys.readouterr().err


def test_integer_outputs_are_compared() -> None:
    a = torch.arange(3)
    assert commands._difference(a, a.clone()) == 0 and commands._difference(a, a + 1) == float("inf")
    assert commands._difference(a, a.int()) == float("inf") and commands._difference(1, 2) == float("inf")
    assert commands._difference(None, None) == 0


def test_parts_that_are_not_run_are_named() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.cross_attn = nn.Linear(4, 4), nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.attn(x)
            return x

    model = Model()
    args = (torch.randn(2, 4),)
    for read in (reads(model, rewrite(model, args)), runs(model, args, {})):
        assert not_run(model, read) == (
            "these inputs do not run layers.[0, 1].cross_attn: the report does not cover it.",
        )
