"""The NKI kernels on the simulator, against a plain float64 attention. Nothing here says that they run on a device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_attn_rewrite import simulator
from neuron_attn_rewrite.config.options import TOLERANCES
from neuron_attn_rewrite.errors import ConfigError, InputError
from neuron_attn_rewrite.kernels.nki import prepare, tiling
from neuron_attn_rewrite.ops import simulated
from neuron_attn_rewrite.ops.arguments import checked_terms
from tests.ops.test_flash_fwd import ALL, Sizes, bias, chunks, expected, operands, padding, relative_error, spans

SMALL = Sizes(2, 2, 1, 150, 200, 16, 16)
FOLDED = Sizes(2, 6, 2, 5, 300, 16, 24)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def launch(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], **how: Any) -> prepare.Launch:
    terms = checked_terms(query, key, value, **options)
    return prepare.flash_fwd(query, key, value, terms, **how)


def assert_right(
    sizes: Sizes,
    dtype: torch.dtype,
    options: dict[str, Any],
    target: str = "gen3",
    lnc: int = 1,
    magnitude: float = 2.5,
) -> None:
    query, key, value = operands(sizes, dtype, magnitude)
    options = {"scale": sizes.head_dim**-0.5, **options}
    out, _ = simulated.run(launch(query, key, value, options, lnc=lnc, target=target), target)
    assert out.shape == (sizes.batch, sizes.heads, sizes.q_len, sizes.v_head_dim) and out.dtype == dtype
    assert relative_error(out, expected(query, key, value, **options)) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_every_mask_and_term(name: str, dtype: torch.dtype) -> None:
    assert_right(SMALL, dtype, ALL[name](SMALL))


@pytest.mark.parametrize("name", ALL)
def test_the_rows_of_a_group_in_one_tile(name: str) -> None:
    assert_right(FOLDED, torch.float32, ALL[name](FOLDED), "gen4")


def test_scale_of_any_sign() -> None:
    for scale in (-0.3, 0.0, 7.0):
        assert_right(SMALL, torch.float32, {"scale": scale, "band_upper": 50, "key_padding": padding(SMALL, "holes")})
        assert_right(SMALL, torch.float32, {"scale": scale, "bias": bias(SMALL, 1, 3), "softcap": 3.0})


def test_biases_as_low_as_numbers_go() -> None:
    """Rows whose biases are all finfo.min are not empty: their weights are what the scores leave, all the same."""
    lowest = torch.finfo(torch.float32).min
    for kept in ((2, 3), (3,), (0, 3)):
        low = torch.zeros([n if d in kept else 1 for d, n in enumerate((2, 2, 150, 200))])
        low[..., 20:] = lowest
        low[..., -1:, :] = lowest
        assert_right(SMALL, torch.float32, {"bias": low, "band_upper": 40})


@pytest.mark.parametrize("target", ["gen3", "gen4"])
@pytest.mark.parametrize("lnc", [1, 2])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(1, 1, 1, 700, 700, 32, 32), {"band_upper": 0}),
        (Sizes(1, 3, 3, 300, 300, 32, 32), {"band_upper": 0, "band_lower": -127}),
        (Sizes(3, 2, 1, 130, 500, 32, 32), {"band_upper": 370, "empty_rows": "mean"}),
        (Sizes(1, 4, 1, 200, 640, 256, 64), {"band_upper": 440, "band_lower": 313, "softcap": 20.0}),
        (Sizes(1, 1, 1, 400, 100, 192, 256), {"band_upper": -5, "empty_rows": "mean"}),
    ],
    ids=str,
)
def test_cores_and_targets(sizes: Sizes, options: dict[str, Any], lnc: int, target: str) -> None:
    assert_right(sizes, torch.bfloat16, options, target, lnc)


@pytest.mark.parametrize("lnc", [1, 2])
def test_more_keys_than_fit(monkeypatch: pytest.MonkeyPatch, lnc: int) -> None:
    """Several sections of keys, several steps in each, several blocks of waiting tiles."""

    def small(*args: Any) -> dict[str, int]:
        return {"section": 384, "chunk": 256, "block": 2}

    monkeypatch.setattr(prepare, "sizes", small)
    sizes = Sizes(1, 2, 1, 600, 900, 32, 32)
    for options in (
        {"band_upper": 300},
        {"band_upper": 300, "band_lower": 20},
        {"bounds": spans(sizes, 1), "sink": torch.randn(2), "empty_rows": "mean"},
        {"bias": bias(sizes, 1, 2, 3), "key_padding": padding(sizes, "holes")},
        {"bias": bias(sizes, 3), "softcap": 4.0},
    ):
        assert_right(sizes, torch.float32, options, lnc=lnc)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "with_bias"),
    [(128, torch.bfloat16, False), (256, torch.bfloat16, True), (256, torch.float32, False)],
)
def test_it_fits_into_memory(head_dim: int, dtype: torch.dtype, with_bias: bool) -> None:
    """SBUF and PSUM as large as they are, for as many keys as are ever loaded and looked at in one step."""
    sizes = Sizes(1, 2, 1, 256, 20480, head_dim, head_dim)
    query, key, value = operands(sizes, dtype)
    options: dict[str, Any] = {"scale": head_dim**-0.5, "band_upper": 20480 - 256, "sink": torch.randn(2)}
    if with_bias:
        options["bias"] = bias(sizes, 2, 3)
    out, _ = simulated.run(launch(query, key, value, options), "gen3", memory="physical")
    plain = torch.ops.neuron_attn.flash_fwd.default(query.float(), key.float(), value.float(), **options)
    assert relative_error(out, plain.double()) <= TOLERANCES[dtype]


def test_bounds_known_only_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "is_static", lambda tensor: False)
    for options in ({"bounds": spans(SMALL, 2)}, {"bounds": chunks(SMALL, 32), "band_upper": 0, "empty_rows": "mean"}):
        assert_right(SMALL, torch.float32, options)


@pytest.mark.parametrize("sizes", [SMALL, FOLDED], ids=str)
def test_a_launch_is_made_without_a_look_at_any_value(sizes: Sizes) -> None:
    """As on a device, where operands have no values while a model is traced."""
    tensors = [t.to("meta") for t in operands(sizes, torch.bfloat16)]
    options: dict[str, Any] = {
        "scale": -0.2,
        "band_upper": 3,
        "key_padding": padding(sizes, "holes").to("meta"),
        "bounds": spans(sizes, 1).to("meta"),
        "bias": bias(sizes, 1, 3).to("meta"),
        "sink": torch.randn(sizes.heads, device="meta"),
        "empty_rows": "mean",
    }
    for used in (options, {"scale": 0.2, "bias": bias(sizes, 1, 2, 3).to("meta"), "band_lower": -3}):
        made = launch(*tensors, used)
        assert all(t.is_meta and t.is_contiguous() for t in made.tensors.values())
        assert made.finish(made.tensors["q"].new_empty(tensors[0].numel() // 16 * sizes.v_head_dim)).is_meta


def test_huge_logits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(SMALL, dtype, {"scale": 40.0, "band_upper": 0}, magnitude=20.0)
    assert_right(SMALL, torch.float32, {"sink": torch.tensor([300.0, -300.0])})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_shapes_and_masks(data: st.DataObject) -> None:
    """Ragged lengths, groups of 1 to 8, windows at tile borders, one key, empty rows, both targets, 1 and 2 cores."""
    border = st.sampled_from([-129, -128, -127, -1, 0, 1, 127, 128, 129])
    length = st.one_of(st.integers(1, 9), st.sampled_from([127, 128, 129, 200, 256, 257, 385]))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (1, 5), (1, 8), (3, 1)]))
    sizes = Sizes(
        data.draw(st.integers(1, 2)),
        kv_heads * group,
        kv_heads,
        data.draw(length),
        data.draw(length),
        data.draw(st.sampled_from([1, 8, 40, 128, 160])),
        data.draw(st.sampled_from([1, 8, 40, 128, 160])),
    )
    options: dict[str, Any] = {"empty_rows": data.draw(st.sampled_from(["zero", "mean"]))}
    if data.draw(st.booleans()):
        options["band_upper"] = data.draw(border) + data.draw(st.sampled_from([0, sizes.kv_len - sizes.q_len]))
    if data.draw(st.booleans()):
        options["band_lower"] = options.get("band_upper", 0) - data.draw(st.sampled_from([0, 1, 126, 127, 128, 255]))
    if data.draw(st.booleans()):
        options["key_padding"] = padding(sizes, data.draw(st.sampled_from(["left", "right", "holes", "empty"])))
    if data.draw(st.integers(0, 3)) == 0:
        options["bounds"] = spans(sizes, 1)
    if data.draw(st.integers(0, 3)) == 0:
        options["softcap"] = 5.0
    if data.draw(st.integers(0, 3)) == 0:
        options["sink"] = torch.randn(sizes.heads) * 4
    if data.draw(st.integers(0, 3)) == 0:
        options["bias"] = bias(sizes, *data.draw(st.sets(st.integers(0, 3))))
    assert_right(
        sizes,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        options,
        data.draw(st.sampled_from(["gen3", "gen4"])),
        data.draw(st.sampled_from([1, 2])),
    )


@pytest.mark.parametrize("lnc", [1, 2])
def test_the_tiling_of_the_sliding_window_kernel(lnc: int) -> None:
    for sizes, size in ((Sizes(1, 1, 1, 400, 700, 32, 32), 512), (Sizes(1, 2, 1, 130, 2500, 16, 16), 2048)):
        query, key, value = operands(sizes, torch.float32)
        offset = sizes.kv_len - sizes.q_len
        options = {"scale": 0.2, "band_upper": offset, "band_lower": offset - 600, "sink": torch.randn(sizes.heads)}
        made = launch(query, key, value, options, lnc=lnc, strategy="SLIDING_WINDOW_KERNEL")
        assert (made.kernel, made.static["seq_tile_size"]) == ("sliding_window_fwd", size)
        out, _ = simulated.run(made, "gen3")
        assert relative_error(out, expected(query, key, value, **options)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_by_itself(dtype: torch.dtype) -> None:
    """Tile after tile of keys, the state handed on by the caller, as the paged kernel does it."""
    sizes = Sizes(1, 1, 1, 100, 640, 64, 32)
    query, key, value = (t[0, 0] for t in operands(sizes, dtype))
    lo = torch.randint(0, 300, (100,))
    hi = lo + torch.randint(1, 300, (100,))
    scores = 0.1 * query.double() @ key.double().T
    added = torch.randn(100, 640)
    scores = 5 * torch.tanh(scores / 5) + added
    j = torch.arange(640)
    scores = scores.masked_fill((j < lo[:, None]) | (j >= hi[:, None]), -torch.inf)
    core = simulator.load("neuron_attn_rewrite.kernels.nki.flash").flash_attention_core
    state: dict[str, Any] = {}
    for a, b in ((0, 256), (256, 512), (512, 640)):
        bounds = torch.stack([lo - a, hi - a], 1).float()
        done = simulator.run(
            core, query, key[a:b], value[a:b], bounds, bias=added[:, a:b].contiguous(), **state,
            key_range=(0, b - a, b - a, b - a), scale=0.1, softcap=5.0, target="gen3",
        )  # fmt: skip
        state = dict(zip(("acc", "neg_max", "total"), done.outputs, strict=True))
    out = state["acc"] / state["total"]
    assert relative_error(out, scores.softmax(-1) @ value.double()) <= TOLERANCES[dtype]
    lse = state["total"].log() - state["neg_max"]
    assert (lse[:, 0].double() - scores.logsumexp(-1)).abs().max() <= 1e-5 * scores.logsumexp(-1).abs().max()


@pytest.mark.parametrize("lnc", [1, 2])
def test_log_sum_exp(lnc: int) -> None:
    query, key, value = operands(SMALL, torch.float32)
    made = launch(query, key, value, {"scale": 0.2, "band_upper": -3}, lnc=lnc)
    _, got = simulated.run(replace(made, static={**made.static, "with_lse": True}, finish=lambda r: r), "gen3")[0]
    scores = (0.2 * query.double() @ key.double().mT).masked_fill(torch.ones(150, 200).triu(-2).bool(), -torch.inf)
    want = scores.logsumexp(-1)
    got = got.reshape(want.shape).double()
    assert (got[..., :3] < -1e25).all()
    assert (got - want)[..., 3:].abs().max() <= 1e-5 * want[..., 3:].abs().max()


def test_gen2_takes_what_needs_no_range_select() -> None:
    assert_right(SMALL, torch.bfloat16, {"key_padding": padding(SMALL, "holes"), "softcap": 3.0}, "gen2")
    assert_right(SMALL, torch.float32, {"bias": bias(SMALL, 1, 2, 3), "sink": torch.randn(2)}, "gen2")
    query, key, value = operands(SMALL, torch.bfloat16)
    with pytest.raises(InputError, match="it has no range_select"):
        launch(query, key, value, {"scale": 1.0, "band_upper": 0}, target="gen2")
    with pytest.raises(InputError, match="gen2 has no pairs of cores"):
        launch(query, key, value, {"scale": 1.0}, target="gen2", lnc=2)


def test_what_no_kernel_takes() -> None:
    for sizes, dtype in ((SMALL, torch.float64), (Sizes(1, 1, 1, 4, 4, 257, 8), torch.float32)):
        query, key, value = operands(sizes, dtype)
        with pytest.raises(InputError, match="the NKI kernels take"):
            launch(query, key, value, {"scale": 1.0})


def instructions(sizes: Sizes, options: dict[str, Any], **how: Any) -> Any:
    query, key, value = operands(sizes, torch.bfloat16)
    return simulated.run(launch(query, key, value, {"scale": 1.0, **options}, **how), "gen3")[1]


def test_masks_cost_only_at_boundary_tiles() -> None:
    def columns(options: dict[str, Any]) -> dict[str, int]:
        trace = instructions(Sizes(1, 1, 1, 1024, 1024, 64, 64), options)
        return {
            op: sum(i.elements for i in trace.instructions if i.op == op)
            for op in ("range_select", "tensor_scalar_reduce")
        }

    assert columns({}) == {"range_select": 0, "tensor_scalar_reduce": 8 * 1024}
    # The diagonal of each tile, and every key before it.
    assert columns({"band_upper": 0}) == {"range_select": 8 * 128, "tensor_scalar_reduce": 128 * sum(range(8))}
    # Window of 256: two ragged blocks a tile, one whole block between them; the first two tiles have no lower side.
    window = columns({"band_upper": 0, "band_lower": -255})
    assert window == {"range_select": 8 * 128 + 6 * 128, "tensor_scalar_reduce": 7 * 128}
    assert columns({"bounds": chunks(Sizes(1, 1, 1, 1024, 1024), 256)}) == {
        "range_select": 0,
        "tensor_scalar_reduce": 8 * 256,
    }


def test_keys_and_values_are_read_once_a_group() -> None:
    sizes = Sizes(1, 8, 2, 256, 384, 64, 64)
    trace = instructions(sizes, {})
    item = 2
    queries = sizes.heads * sizes.q_len * 64 * item
    bounds = 2 * sizes.q_len * 2 * 4
    assert trace.hbm_read == queries + 2 * sizes.kv_heads * sizes.kv_len * 64 * item + bounds
    assert trace.hbm_written == queries


def test_run_covers_what_rows_see() -> None:
    """The key ranges against the mask itself, for many bands."""
    bands: list[tuple[int, int, int | None, int | None]] = [
        (1, 1, 0, 0),
        (300, 500, -130, 3),
        (129, 700, 100, 571),
        (400, 90, -7, -3),
        (256, 256, None, 0),
        (513, 40, 5, None),
    ]
    for q_len, kv_len, lower, upper in bands:
        intervals = tiling.band(q_len, kv_len, lower, upper, torch.device("cpu"))
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        seen = (j >= i + (-math.inf if lower is None else lower)) & (j <= i + (math.inf if upper is None else upper))
        assert torch.equal(seen, (j >= intervals.lo.T) & (j < intervals.hi.T))
        for start, key_range in zip(tiling.tile_starts(q_len), tiling.key_ranges(intervals, True), strict=True):
            tile = seen[start : start + 128]
            first, full_start, full_stop, stop = key_range
            assert not tile[:, :first].any() and not tile[:, stop:].any()
            assert tile[:, full_start:full_stop].all() and first % 128 == 0
            assert (first >= stop) == (not tile.any())


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulated.simulating() is None
    monkeypatch.setenv(simulated.VARIABLE, "1")
    assert simulated.simulating() == "gen3"
    with simulated.simulated("gen4"):
        assert simulated.simulating() == "gen4"
    monkeypatch.setenv(simulated.VARIABLE, "trn2")
    with pytest.raises(ConfigError, match="NEURON_ATTN_SIMULATE='trn2' is not possible"):
        simulated.simulating()


def test_the_op_runs_its_kernel() -> None:
    query, key, value = operands(SMALL, torch.float32)
    options = {"scale": 0.2, "band_upper": 0, "lnc": 2}
    flash_fwd = torch.ops.neuron_attn.flash_fwd.default
    plain = flash_fwd(query, key, value, **options)
    with simulated.simulated("gen4"):
        out = flash_fwd(query, key, value, **options)
        nothing = flash_fwd(query, key[:, :, :0], value[:, :, :0], **options)
    assert not torch.equal(out, plain) and relative_error(out, plain.double()) <= TOLERANCES[torch.float32]
    assert nothing.count_nonzero() == 0
