"""A rewritten model as a file: it comes back as it was, and a file from a stranger runs no code."""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import InputError, RewriteError, RewriteWarning, RewrittenModule, rewrite, rewrite_for_trace
from neuron_attn_rewrite.capture.objects import leaves
from neuron_attn_rewrite.storage import file, graph
from tests.capture.test_objects import MODELS, call_of, default_model
from tests.helpers import ALWAYS, relative_error
from tests.test_state import Masked


def stored(rewritten: RewrittenModule, path: Path, **options: Any) -> RewrittenModule:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewritten.save(path / "model", **options)
        return RewrittenModule.load(path / "model")


def saved(model: nn.Module, path: Path, *args: Any, dynamic_shapes: Any = None) -> tuple[RewrittenModule, Path]:
    rewritten = rewrite(model.eval(), args, config=ALWAYS, dynamic_shapes=dynamic_shapes)
    rewritten.save(path / "model")
    return rewritten, path / "model"


@pytest.mark.parametrize("name", MODELS)
def test_language_models_come_back(name: str, tmp_path: Path) -> None:
    model = default_model(name)
    ids, given = call_of(name, 0, 0)
    rewritten = rewrite(model, (ids,), given, config=ALWAYS)
    loaded = stored(rewritten, tmp_path)
    assert loaded.report.sites == rewritten.report.sites and str(loaded.report) == str(rewritten.report)
    assert loaded.config.to_dict() == model.config.to_dict() and type(loaded.config) is type(model.config)
    assert list(inspect.signature(loaded.forward).parameters) == list(inspect.signature(model.forward).parameters)
    state = rewritten.state_dict()
    assert loaded.state_dict().keys() == state.keys() and not loaded.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    ids, given = call_of(name, 1, 5)
    with torch.no_grad():
        old, new = rewritten(ids, **given), loaded(ids, **given)
    assert type(old) is type(new) and list(old) == list(new) and type(old.past_key_values) is type(new.past_key_values)
    assert old.past_key_values.get_seq_length() == new.past_key_values.get_seq_length()
    assert all(torch.equal(a, b) for a, b in zip(leaves(old), leaves(new), strict=True))
    with pytest.raises(InputError, match="was captured as"):
        loaded(ids[:, 1:], **given)


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("turned", torch.randn(16, 8).T)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)[:, None] + self.turned
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x))

    ids = torch.arange(8)[None]
    rewritten, path = saved(Tied(), tmp_path, ids)
    loaded = RewrittenModule.load(path)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    assert parameters["table.weight"] is parameters["head.weight"] and parameters["head.weight"].requires_grad
    assert path.stat().st_size < 2 * 64 * 16 * 4 + 16 * 8 * 4 + len(file.read(path).document["report"]) + 20_000
    assert loaded.turned.stride() == rewritten.turned.stride() and torch.equal(loaded(ids), rewritten(ids))


def test_without_weights(tmp_path: Path) -> None:
    model, x = Masked(reads_mask=True).eval(), torch.randn(1, 8, 16)
    rewritten = rewrite(model, (x,), config=ALWAYS)
    rewritten.save(tmp_path / "model", weights=False)
    with pytest.raises(InputError, match="has no weights: give the model"):
        RewrittenModule.load(tmp_path / "model")
    for weights in (model, model.state_dict(), rewritten):
        loaded = RewrittenModule.load(tmp_path / "model", weights=weights)
        assert torch.equal(loaded(x), rewritten(x))
    assert (
        dict(RewrittenModule.load(tmp_path / "model", weights=model).named_parameters())["qkv.weight"]
        is model.qkv.weight
    )
    state = model.state_dict()
    wrong: list[tuple[Any, str]] = [
        ({}, r"weights has no .*offset"),
        (
            {**state, "offset": torch.zeros(3)},
            r"'offset' is torch\.float32 \[3\], and was saved as torch\.float32 \[16\]",
        ),
        ({**state, "offset": state["offset"].half()}, r"'offset' is torch\.float16"),
        (3, "weights must be a model or a state_dict"),
    ]
    for weights, words in wrong:
        with pytest.raises(InputError, match=words):
            RewrittenModule.load(tmp_path / "model", weights=weights)
    with pytest.raises(RewriteError, match="a proof depends on the value of 'mask'"):
        RewrittenModule.load(tmp_path / "model", weights={**state, "mask": torch.ones(8, 8, dtype=torch.bool)})


def test_what_a_proof_read_is_checked_after_a_load(tmp_path: Path) -> None:
    x = torch.randn(1, 8, 16)
    rewritten, path = saved(Masked(), tmp_path, x)
    loaded = RewrittenModule.load(path)
    assert torch.equal(loaded(x), rewritten(x))
    loaded.get_buffer("scale").fill_(2.0)
    with pytest.raises(RewriteError, match="'scale' has changed"):
        loaded(x)
    rewritten.get_buffer("scale").fill_(2.0)
    with pytest.raises(RewriteError, match="'scale' has changed"):
        rewritten.save(path)


class Open(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y], 2)
        return nn.functional.scaled_dot_product_attention(x, both, both) * x.shape[2]


def test_open_sizes_stay_open(tmp_path: Path) -> None:
    from torch.export import Dim

    length, more = Dim("length", min=3, max=50), Dim("more", min=4)
    shapes = {"x": {2: length}, "y": {2: 2 * more}}
    rewritten, path = saved(Open(), tmp_path, torch.randn(1, 2, 8, 4), torch.randn(1, 2, 12, 4), dynamic_shapes=shapes)
    loaded = RewrittenModule.load(path)
    for size, behind in ((8, 12), (50, 20), (3, 8)):
        x, y = torch.randn(1, 2, size, 4), torch.randn(1, 2, behind, 4)
        assert torch.equal(loaded(x, y), rewritten(x, y)) and relative_error(loaded(x, y), Open()(x, y)) < 1e-5
    for size, behind in ((51, 12), (8, 13), (8, 6)):
        x, y = torch.randn(1, 2, size, 4), torch.randn(1, 2, behind, 4)
        told = []
        for module in (rewritten, loaded):
            with pytest.raises(InputError) as error:
                module(x, y)
            told.append(str(error.value).partition(":")[2])
        assert "at most" in told[1] or "at least" in told[1] or "is not" in told[1]


def test_buffers_that_are_written_go_on(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return nn.functional.scaled_dot_product_attention(x, x, x) + self.calls

    x = torch.randn(1, 2, 8, 4)
    rewritten, path = saved(Counting(), tmp_path, x)
    rewritten(x)
    rewritten.save(path)
    loaded = RewrittenModule.load(path)
    assert torch.equal(loaded(x), rewritten(x)) and torch.equal(loaded(x), rewritten(x))
    assert not loaded.state_dict()


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Store:
    def __init__(self, kept: Tensor) -> None:
        self.kept, self.note = kept, "a note"


class Returning(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, kind: type = int) -> Any:
        return self.make(nn.functional.scaled_dot_product_attention(x, x, x) * scale)


@pytest.mark.parametrize(
    "make", [lambda o: {"a": [o, (o + 1, None)], "b": {1: o}}, lambda o: [o], lambda o: (o,), lambda o: None or o]
)
def test_plain_outputs_come_back_as_they_are(make: Any, tmp_path: Path) -> None:
    x = torch.randn(1, 2, 8, 4)
    rewritten = rewrite(Returning(make), (x,), config=ALWAYS)
    old, new = rewritten(x), stored(rewritten, tmp_path)(x)
    assert pytree.tree_structure(old) == pytree.tree_structure(new)
    assert all(
        torch.equal(a, b) for a, b in zip(leaves(old, (Tensor,)), leaves(new, (Tensor,)), strict=True) if a is not None
    )


@pytest.mark.parametrize("make", [lambda o: {"it": Store(o)}, lambda o: {"it": Pair(o, o + 1)}])
def test_classes_of_the_caller_come_back_as_plain_data(make: Any, tmp_path: Path) -> None:
    x = torch.randn(1, 2, 8, 4)
    rewritten = rewrite(Returning(make), (x,), config=ALWAYS)
    with pytest.warns(RewriteWarning, match=r"(Store|Pair) among the outputs will be plain dicts or tuples"):
        rewritten.save(tmp_path / "model")
    found = RewrittenModule.load(tmp_path / "model")(x)
    assert type(found["it"]) is tuple and torch.equal(found["it"][0], leaves(rewritten(x))[0])


def test_a_class_that_is_not_installed_comes_back_as_a_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = default_model("llama")
    ids, given = call_of("llama", 0, 0)
    rewritten = rewrite(model, (ids,), given, config=ALWAYS)
    rewritten.save(tmp_path / "model")
    real = importlib.import_module

    def missing(name: str, *more: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.warns(
        RewriteWarning, match=r"DynamicCache.* is not installed: such outputs are plain dicts or tuples now"
    ):
        loaded = RewrittenModule.load(tmp_path / "model")
    found = loaded(ids, **given)
    assert type(found) is dict and len(found["past_key_values"]) == 4 and not hasattr(loaded, "config")
    assert torch.equal(found["logits"], rewritten(ids, **given).logits)


def test_a_file_is_read_without_the_model(tmp_path: Path) -> None:
    x = torch.randn(1, 8, 16)
    rewritten, path = saved(Masked(), tmp_path, x)
    file_x = tmp_path / "x"
    torch.save((x, rewritten(x)), file_x)
    code = (
        "import torch; from neuron_attn_rewrite import RewrittenModule\n"
        f"x, out = torch.load({str(file_x)!r})\nm = RewrittenModule.load({str(path)!r})\n"
        "assert torch.equal(m(x), out) and len(m.report.replaced) == 1; print('as it was')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "as it was" in done.stdout, done.stderr


def test_what_can_not_be_saved_is_named(tmp_path: Path) -> None:
    class Silu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.silu(nn.functional.scaled_dot_product_attention(x, x, x))

    x = torch.randn(1, 2, 8, 4)
    with pytest.raises(RewriteError, match=r"Save the result of `rewrite`, not of `rewrite_for_trace`"):
        rewrite_for_trace(Silu(), x, ALWAYS).save(tmp_path / "model")
    rewritten = rewrite(Masked().eval(), (torch.randn(1, 8, 16),), config=ALWAYS).to("meta")
    with pytest.raises(RewriteError, match=r"has no values: it is on the meta device. Save without weights"):
        rewritten.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = saved(Masked(), tmp_path, torch.randn(1, 8, 16))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RewriteError, match="with safetensors: pip install safetensors"):
        RewrittenModule.load(path)


# Other versions, and damaged files


def with_document(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same file with another document."""
    found = file.read(path)
    document = json.loads(json.dumps(found.document))
    change(document)
    from safetensors.torch import save_file

    tensors = {n: t.clone() for n, t in found.tensors.items()}
    save_file(tensors, str(path), metadata={file.KEY: json.dumps(document)})
    return path


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(Masked(), tmp_path_factory.mktemp("master"), torch.randn(1, 8, 16))[1]


@pytest.fixture
def path(tmp_path: Path, master: Path) -> Path:
    return Path(shutil.copy(master, tmp_path / "model"))


def test_another_version_is_named(path: Path) -> None:
    with_document(path, lambda d: d.update(made_with="neuron_attn_rewrite 9.9 and torch 9.8"))
    with pytest.warns(RewriteWarning, match=r"written by neuron_attn_rewrite 9\.9 and torch 9\.8, and is read by"):
        RewrittenModule.load(path)
    with_document(path, lambda d: d["graph"]["nodes"][-2].update(target="aten.of_the_future.default"))
    with pytest.raises(InputError, match=r"9\.9 and torch 9\.8.*there is no operator aten\.of_the_future"):
        RewrittenModule.load(path)
    with_document(path, lambda d: d.update(format=2))
    with pytest.raises(InputError, match=r"was written by neuron_attn_rewrite 9\.9.* in format 2, and this package"):
        RewrittenModule.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = tmp_path / "plain"
    save_file({"a": torch.ones(1)}, str(plain))
    (tmp_path / "text").write_text("not a file")
    torch.save({"a": 1}, tmp_path / "pickle")
    for name, words in (
        ("plain", "did not write it"),
        ("text", "is no file of"),
        ("pickle", "is no file of"),
        ("x", "no file"),
    ):
        with pytest.raises(InputError, match=words):
            RewrittenModule.load(tmp_path / name)


CODE = "__import__('pathlib').Path('{}').touch()"


def first(kind: str, **changes: Any) -> Callable[[dict[str, Any], str], None]:
    """Change the first node with this op."""

    def change(document: dict[str, Any], code: str) -> None:
        node = next(n for n in document["graph"]["nodes"] if n["op"] == kind)
        text = json.dumps(changes).replace("CODE", json.dumps(code)[1:-1])
        node.update(json.loads(text))

    return change


def at(*place: Any, value: Any) -> Callable[[dict[str, Any], str], None]:
    def change(document: dict[str, Any], code: str) -> None:
        owner: Any = document
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = json.loads(json.dumps(value).replace("CODE", json.dumps(code)[1:-1]))

    return change


HOSTILE = [
    first("placeholder", name="x); CODE #"),
    first("placeholder", target="x=CODE"),
    first("get_attr", target='a", CODE) #'),
    first("get_attr", target="report"),
    first("get_attr", target="__class__.__init__"),
    first("call_function", name="y = CODE #"),
    first("call_function", target="os.system", args=["touch CODE"]),
    first("call_function", target="builtins.eval", args=["CODE"]),
    first("call_function", target="eval", args=["CODE"]),
    first("call_function", target="aten.from_file.default", args=["FILE", True, 16]),
    first("call_function", target="aten.save.default", args=[{"node": "x"}, "FILE"]),
    first("call_function", target="load_library.x.y", args=["CODE"]),
    first("call_function", target="aten.__class__.__init__"),
    first("call_function", target="aten.linear.__class__"),
    first("call_function", target="getattr", args=[{"node": "x"}, "__class__"]),
    first("call_function", target="getitem", args=[{"node": "x"}]),
    first("call_function", kwargs={"dict": [["a=CODE, b", 1]]}),
    first("call_function", args=[{"node": "none"}]),
    first("call_function", args=[{"dtype": "load"}]),
    first("call_function", args=[{"eval": "CODE"}]),
    first("get_attr", op="call_module", target="qkv"),
    first("get_attr", op="call_method", target="CODE"),
    at("graph", "arguments", value=["x=CODE"]),
    at("graph", "arguments", 0, value="def"),
    at("graph", "symbols", value={"s0": ["CODE", None, 4]}),
    at("graph", "symbols", value={"CODE": [2, None, 4]}),
    at("graph", "outputs", value={"output": ["os:system", [["command", {"leaf": 0}]]]}),
    at("graph", "outputs", value={"output": ["transformers.modeling_outputs:torch", [["a", {"leaf": 0}]]]}),
    at(
        "graph", "outputs", value={"output": ["transformers.models.bert.modeling_bert:BertModel", [["a", {"leaf": 0}]]]}
    ),
    at(
        "graph",
        "outputs",
        value={"output": ["transformers.modeling_outputs:BaseModelOutput", [["no_field", {"leaf": 0}]]]},
    ),
    at("graph", "outputs", value={"object": ["subprocess:Popen", [["args", {"literal": "CODE"}]], {"leaf": 0}]}),
    at("graph", "outputs", value={"object": ["transformers.cache_utils:torch", [], {"leaf": 0}]}),
    at("graph", "outputs", value={"leaf": 7}),
    at("graph", "outputs", value={"leaf": 0, "more": 1}),
    at("graph", "inputs", value={"dict": [["CODE", {"leaf": 0}]]}),
    at("graph", "inputs", value={"tuple": [{"tuple": []}, {"dict": [["x':CODE, 'y", {"leaf": 0}]]}]}),
    at("graph", value=[]),
    at("graph", "nodes", value=[]),
    at("report", value="{}"),
    at("report", value="CODE"),
    at("signature", value=[["CODE", "KEYWORD_ONLY"]]),
    at("signature", value=[["x", "eval"]]),
    at("config", value={"model_type": ["CODE"]}),
    at("config", value=["CODE"]),
    at("proven", value=["no.such"]),
    at("parameters", value=["CODE"]),
    at("strides", value={"mask": [10**12, 10**12]}),
    at("strides", value={"mask": [-1, 1]}),
    at("aliases", value={"forward": "mask"}),
    at("aliases", value={"report": "mask"}),
    at("aliases", value={"a": "no.such"}),
    at("aliases", value={"a'b": "mask"}),
    at("left_out", value={"CODE": [[1], "CODE"]}),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_file_runs_no_code(number: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = path.parent / "mark"
    with_document(path, lambda document: HOSTILE[number](document, CODE.format(mark)))
    for unsafe in ("load", "compile"):
        monkeypatch.setattr(torch, unsafe, lambda *a, **k: pytest.fail("unpickled or compiled"))
    with pytest.raises(InputError, match=r"is damaged|can't be read|has no weights"):
        RewrittenModule.load(path)
    assert not mark.exists()


def test_no_pickle_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("unpickled"))
    monkeypatch.setattr(builtins, "eval", lambda *a, **k: pytest.fail("evaluated"))
    assert len(RewrittenModule.load(path).report.replaced) == 1


def test_every_function_that_may_be_called_is_harmless() -> None:
    assert all(callable(function) for function in graph.FUNCTIONS.values())
    assert not {"call", "attrgetter", "methodcaller", "itemgetter"} & set(graph.FUNCTIONS)
    assert transformers.__version__


class Parts(nn.Module):
    """A buffer, and a part of it as another buffer."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.register_buffer("whole", torch.ones(2, 8))
        self.register_buffer("part", self.whole[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.whole.mul_(2.0)
        return nn.functional.scaled_dot_product_attention(x * self.part, x, x) + self.whole[0]


def test_buffers_that_share_written_memory_are_not_parted(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 6, 8)
    rewritten = rewrite(Parts(writes=False), (x,), config=ALWAYS)
    rewritten.save(tmp_path / "read")
    assert torch.equal(RewrittenModule.load(tmp_path / "read")(x), rewritten(x))
    with pytest.raises(RewriteError, match="'whole' and 'part' share memory that the model writes"):
        rewrite(Parts(writes=True), (x,), config=ALWAYS).save(tmp_path / "written")
