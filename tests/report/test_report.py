"""Reports: what they hold, how they are printed, drawn, stored, compared, and rebuilt as a script."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import neuron_attn_rewrite
from neuron_attn_rewrite import InputError, RewriteConfig, RewriteError, RewriteReport, SiteReport, rewrite
from neuron_attn_rewrite.masks.spec import Band, Chunked, Claim, Intervals, KeyPadding, MaskSpec
from neuron_attn_rewrite.report.drawing import GAP, HEIGHT, LAYER, WIDTH, Box, boxes, layout
from neuron_attn_rewrite.report.groups import common_name, groups, ranges
from neuron_attn_rewrite.report.html import magnitude
from neuron_attn_rewrite.report.pictures import mask_svg
from neuron_attn_rewrite.report.text import amount
from tests.helpers import ALWAYS

LENGTH = 16


class Layer(nn.Module):
    """Grouped heads, a softcap, a bias, a causal mask with padding, sinks: everything that a report can name."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, bias: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = 30.0 * torch.tanh(query @ key.transpose(-1, -2) * 0.25 / 30.0) + bias
        visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & attention_mask[:, None, None, :].bool()
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        sinks = torch.zeros(1, 4, 1, 1).expand(2, 4, LENGTH, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value


class Model(nn.Module):
    """Two layers alike, one attention that is not understood, one that is understood and stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, bias: Tensor) -> Any:
        for layer in self.layers:
            query = layer(query, key, value, attention_mask, bias)
        strange = torch.erf(query @ query.transpose(-1, -2)).softmax(-1) @ query
        wide = torch.cat([query] * 40, -1)
        return strange, nn.functional.scaled_dot_product_attention(wide, wide, wide)


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, LENGTH, 8) for heads in (4, 2, 2))
    return query, key, value, torch.ones(2, LENGTH, dtype=torch.int64), torch.randn(1, 4, LENGTH, LENGTH)


@pytest.fixture(scope="module")
def report() -> RewriteReport:
    return rewrite(Model(), inputs(), config=ALWAYS).report


def test_what_a_site_holds(report: RewriteReport) -> None:
    first, second, strange, wide = report.sites
    assert first.source.startswith("tests/report/test_report.py:") and "query = layer(" not in first.source_code
    assert first.source_code and first.source_code in Path(__file__).read_text(encoding="utf-8")
    assert {n.role for n in first.before} >= {"query", "key", "value", "removed", "mask"}
    assert not {n.role for n in second.before} & {"kept", "added"}
    assert {n.role for n in first.after} == {"query", "key", "value", "operand", "added"}
    (call,) = (n for n in first.after if "flash_fwd" in n.op)
    assert call.shape == (2, 4, LENGTH, 8) and call.op == "neuron_attn.flash_fwd.default"
    assert first.score_bytes == 2 * 4 * LENGTH * LENGTH * 4
    assert first.flops == 2 * 2 * 4 * LENGTH * LENGTH * (8 + 8)
    assert first.visible == (LENGTH + 1) / 2 / LENGTH
    assert report.score_bytes_saved == 2 * first.score_bytes
    assert strange.reasons[0].code == "unknown-node" and {n.role for n in strange.before} == {"kept", "operand"}
    assert not strange.after and strange.score_bytes == strange.flops == 0 and strange.visible == 1
    assert wide.reasons[-1].code == "head-dim" and [n.op for n in wide.before if n.role == "kept"]


def test_text(report: RewriteReport, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = report.to_text()
    assert plain == str(report) and "\x1b" not in plain
    assert "layers.[0-1]  (2 times)" in plain and "[unknown-node]" in plain and "2 of 4" in plain
    coloured = report.to_text(color=True)
    assert "\x1b[" in coloured and re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert report.to_text() == coloured


def test_text_is_stable_from_run_to_run(report: RewriteReport) -> None:
    again = rewrite(Model(), inputs(), config=ALWAYS).report
    assert str(again) == str(report) and again.to_json() == report.to_json()


def test_markdown(report: RewriteReport) -> None:
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(groups(report))
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_json_is_what_the_schema_says_and_comes_back(report: RewriteReport) -> None:
    schema = json.loads((Path(neuron_attn_rewrite.__file__).parent / "report/schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    site = report.sites[0]
    claims: tuple[Claim, ...] = (Band(-3, 0), Chunked(4), Intervals(((0, 2),) * LENGTH), KeyPadding("mask"))
    more = [replace(site, mask=MaskSpec((claim,))) for claim in claims]
    odd = replace(site, max_error=float("inf"), scale=float("nan"))
    for some in (report, replace(report, sites=(*more,)), replace(report, sites=(replace(odd, scale=1.0),))):
        data = json.loads(some.to_json())
        jsonschema.validate(data, schema)
        assert RewriteReport.from_json(some.to_json()) == some
    jsonschema.validate(json.loads(replace(report, sites=(odd,)).to_json(), parse_constant=pytest.fail), schema)
    broken = json.loads(report.to_json())
    broken["sites"][0]["mask"]["kind"] = "Nothing"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
    with pytest.raises(InputError, match="damaged"):
        RewriteReport.from_json(json.dumps(broken))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[]", "no schema version"), ('{"schema": 99}', "schema is 99"), ('{"schema": 1}', "damaged")],
)
def test_json_of_something_else_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        RewriteReport.from_json(text)


def test_diff(report: RewriteReport) -> None:
    assert not report.diff(report) and str(report.diff(report)) == "no change"
    first = report.sites[0]
    moved = replace(report, sites=tuple(replace(s, source="elsewhere.py:1", max_error=0.5) for s in report.sites))
    assert not report.diff(moved)
    windowed = replace(first, mask=MaskSpec((Band(-3, 0),)))
    assert "mask" in str(report.diff(replace(report, sites=(windowed, *report.sites[1:]))))
    intervals = [replace(first, mask=MaskSpec((Intervals(((0, n),) * LENGTH),))) for n in (2, 3)]
    a, b = (replace(report, sites=(site,)) for site in intervals)
    assert a.diff(b)
    lost = report.diff(replace(report, sites=report.sites[:1], target="trn1", unused_inputs=("bias",)))
    assert [line[0] for line in lost.lines] == ["~", "+", "-", "-", "-"] and "input bias" in lost.lines[1]
    real = report.diff(rewrite(Model(), inputs(), config=RewriteConfig(policy="sdk", lnc=1)).report)
    text = str(real)
    assert real and "layers.[0-1]: strategy SHARDED_KERNEL -> NONE" in text and "policy-always" in text


@pytest.mark.parametrize("number", range(4))
def test_a_reproducer_runs(report: RewriteReport, number: int) -> None:
    """It finds the same attention, and nothing else."""
    script = report.reproducer(number)
    space: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(script, "reproducer.py", "exec"), space)
    site, (again,) = report.sites[number], space["rewritten"].report.sites
    same = (
        "batch",
        "num_heads",
        "num_kv_heads",
        "q_len",
        "kv_len",
        "scale",
        "softcap",
        "sink",
        "bias",
        "mask",
        "kernel",
    )
    assert [getattr(again, name) for name in same] == [getattr(site, name) for name in same], script
    assert site.reasons[-1].code == again.reasons[-1].code
    (error,) = re.findall(r"fresh inputs: (\S+) of", printed.getvalue())
    assert float(error) <= 2e-5


def test_a_reproducer_is_asked_for_by_name(report: RewriteReport) -> None:
    assert report.reproducer("layers.1") == report.reproducer(1) == report.reproducer(report.sites[1])
    with pytest.raises(InputError, match=r"no site 'layers\.9'.*layers\.0"):
        report.reproducer("layers.9")
    with pytest.raises(InputError, match="does not hold the nodes"):
        report.reproducer(SiteReport("a", "b"))


# Names, numbers and pictures


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["a.1.b"], "a.1.b"),
        (["a.0.b", "a.1.b", "a.2.b"], "a.[0-2].b"),
        (["a.0.b", "a.2.b", "a.4.b"], "a.[0,2..4].b"),
        (["a.0", "a.1", "a.5"], "a.[0-1,5]"),
        (["a", "b"], "a, b"),
        (["a.0.b.1", "a.1.b.0", "c"], "a.0.b.1, ..., c"),
    ],
)
def test_common_name(names: list[str], name: str) -> None:
    assert common_name(names) == name


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_hold_every_number_and_no_other(numbers: set[int]) -> None:
    text = ranges(sorted(numbers))
    found: set[int] = set()
    for part in text.split(",") if ".." not in text else []:
        lo, _, hi = part.partition("-")
        found |= set(range(int(lo), int(hi or lo) + 1))
    if ".." in text:
        first, second, last = map(int, re.split(r",|\.\.", text))
        found = set(range(first, last + 1, second - first))
    assert found == numbers


def test_amounts() -> None:
    assert [amount(n) for n in (0, 1023, 1024, 3 << 29)] == ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB"]
    assert [magnitude(n) for n in (0, 999, 12_300, 4_190_000)] == ["0", "999", "12.3 k", "4.19 M"]


def test_the_picture_of_a_mask_shows_what_is_seen(report: RewriteReport) -> None:
    """The inked area is the visible part, to the size of a cell."""
    for claims in ((), (Band(upper=0),), (Band(-3, 0),), (Chunked(4),), (Band(-1, 1),)):
        site = replace(report.sites[0], mask=MaskSpec(claims), bias=None)
        svg = mask_svg(site)
        inked = sum(float(w) * float(h) for w, h in re.findall(r"h([\d.]+)v([\d.]+)h-", svg))
        assert inked / 64**2 == pytest.approx(site.visible, abs=1e-3)
        assert 'class="padding"' not in svg and 'class="dense"' not in svg
    assert 'class="padding"' in mask_svg(report.sites[0]) and 'class="dense"' in mask_svg(report.sites[0])
    assert "?" in mask_svg(report.sites[2])
    long = replace(report.sites[0], q_len=2**20, kv_len=2**20)
    assert len(mask_svg(long)) < 4000


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 40), max_size=4), min_size=1, max_size=14))
def test_drawn_boxes_do_not_overlap_and_edges_run_down(graph: list[set[int]]) -> None:
    drawn = [Box(str(i), "", "", "kept", tuple(str(j) for j in sorted(read) if j < i)) for i, read in enumerate(graph)]
    plan = layout(drawn)
    rows: dict[int, list[float]] = {}
    for column, row in plan.at.values():
        rows.setdefault(row, []).append(column)
    assert all(b - a >= 0.999 for columns in rows.values() for a, b in pairwise(sorted(columns)))
    assert set(plan.routes) == {(i, box.name) for box in drawn for i in box.inputs}
    for (start, end), bends in plan.routes.items():
        assert [row for _, row in bends] == list(range(plan.at[start][1] + 1, plan.at[end][1]))
        half = WIDTH / (WIDTH + GAP) / 2
        assert all(abs(bend - column) > half for bend, row in bends for column in rows.get(row, []))
    assert HEIGHT < LAYER


def test_a_mask_is_drawn_as_one_box(report: RewriteReport) -> None:
    drawn = boxes(report.sites[0].before)
    assert sum(box.role == "mask" for box in drawn) == 1
    assert {"query", "key", "value"} <= {box.title for box in drawn}
    names = {box.name for box in drawn}
    assert all(any(i in names for i in box.inputs) for box in drawn if box.role == "removed")


def test_dot(report: RewriteReport) -> None:
    dot = report.to_dot()
    assert dot.count("{") == dot.count("}") and dot.count(" -> ") > 20 and "flash_fwd" in dot
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=dot, text=True, check=True, capture_output=True)


# The page


VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that every tag is closed, and collects tags, texts and what would be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action", "data") and value:
                (self.links if value.startswith("#") else self.loaded).append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_page_needs_nothing_else(report: RewriteReport, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    text = report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    page = Page(text)
    assert not page.loaded and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "http" not in text and "@import" not in text and re.findall(r"url\(([^)]*)\)", text) == ["#dots", "#hatch"]
    assert len(set(page.ids)) == len(page.ids) and {link[1:] for link in page.links} <= set(page.ids)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    for site in report.sites:
        assert all(reason.code in text for reason in site.reasons)
        assert site.source in text
    assert text.count('class="graph"') == 4  # before and after of one kind, before of the two that stay


def test_the_page_escapes_what_it_is_given(report: RewriteReport) -> None:
    site = replace(report.sites[0], name="<script>alert(1)</script>", source_code='a < b & "c"')
    page = Page(replace(report, sites=(site, site)).to_html())
    assert "script" not in page.tags


def test_the_page_of_nothing(report: RewriteReport) -> None:
    assert "No attention was found" in replace(report, sites=()).to_html()


def test_a_missing_extra_gives_one_clear_line(report: RewriteReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RewriteError, match=r"needs jinja2: pip install jinja2"):
        report.to_html()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_draws_the_page(report: RewriteReport, tmp_path: Path) -> None:
    """A screenshot as a phone sees it: it is written, and more than an empty page."""
    report.to_html(tmp_path / "report.html")
    picture = tmp_path / "report.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=500,900"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = (tmp_path / "report.html").as_uri()
    command = ["chromium", *options, profile, f"--screenshot={picture}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000
