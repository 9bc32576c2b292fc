"""The report page as HTML: what it says, what it is made of, and that nothing in it comes from elsewhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit.errors import BadInputError
from moebit.report import facts
from moebit.report.command import python_call
from moebit.report.page import report_page
from tests.report.made_up import documents, evaluation
from tests.support.models import ARCHITECTURES
from tests.support.outputs import Outputs

VOID = {"meta", "link", "br", "img", "image"}
MIXTRAL = ARCHITECTURES["mixtral"]


class Page(HTMLParser):
    """A page as a parser sees it; an end tag that closes nothing, or another element than the last, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.mark.parametrize(
    "given", [{}, {"mixed": True, "trouble": True, "evaluated": False}, {"calibrated": False}, {"layers": 1, "experts": 2}]
)
def test_a_page_is_whole_and_by_itself(given: dict[str, Any]) -> None:
    text = report_page(documents(**given))
    page = Page(text)
    assert all(reference.startswith("data:") for reference in page.references), "nothing is loaded"
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert len(page.ids) == len(set(page.ids))
    assert "nan" not in page.text.lower().split()


def test_what_it_says() -> None:
    page = Page(report_page(documents(trouble=True)))
    for said in (
        "16.3 GB", "3.74 × smaller than 61.1 GB", "4.12", "5.41", "92.0%", "72 min", "3.1 GB",  # summary
        "2.0% of the expert parameters stay in full precision", "7 matrices fell back", "No calibration token reached 1 expert of 128",
        "need more than --memory", "cannot run it", "it does not know the native format", "with import moebit , which",
        "no calibration token reached expert 0", "gate rounded to nearest, because no factorisation succeeded: expert 1",
        "moebit quantize some/model -o out --recipe gptq-w4", "seed 0", "router 4 model.layers.0.mlp.gate",
    ):  # fmt: skip
        assert re.sub(r"\s+", " ", said) in page.text.replace("  ", " "), said


def test_warnings_are_only_for_what_is_wrong() -> None:
    assert facts.warnings(documents()) == []
    (only,) = facts.warnings(documents(evaluated=False))
    assert "has not been measured" in only
    ruined = documents()
    ruined.report["layers"][0]["experts"]["up_proj"]["weight_error"][3] = math.nan
    ruined.report["layers"][0]["linears"]["self_attn.q_proj"]["weight_error"] = 0.9
    assert facts.warnings(ruined)[0].startswith("2 matrices of 400 lost more than half")
    assert "useless" not in facts.warnings(ruined)[0]
    for part in ruined.report["layers"][1]["experts"].values():
        part["weight_error"] = [0.8] * 32
    assert "likely to be useless" in facts.warnings(ruined)[0]
    assert "up lost more than half of its weight: expert 3" in Page(report_page(ruined)).text


def test_sections_are_there_when_their_numbers_are() -> None:
    def headings(page: str) -> set[str]:
        return set(re.findall(r"<h2>(.*?)</h2>", page))

    full = headings(report_page(documents(mixed=True)))
    assert {"Quality", "Routing", "Error", "Load of the experts", "Bits", "Time and memory", "Layers"} <= full
    assert "Bits" not in headings(report_page(documents()))
    bare = headings(report_page(documents(calibrated=False, evaluated=False)))
    assert not {"Quality", "Routing", "Load of the experts"} & bare
    balanced = documents()
    for layer in balanced.report["layers"]:
        layer["balance"] = {"wanted": 3.5, "short_before": 2, "short_after": 0, "drawn": [2] * 32}
        agreed = {"routing_exact": 0.9, "routing_overlap": 0.95, "kl": None}
        layer["router"] = {"score": "softmax", "against": "full precision", "before": agreed, "after": agreed, "skipped": {}}
        layer["coactivation"] = [[0, 2], [2, 0]]
    page = report_page(balanced)
    assert "Load before balancing" in page
    assert "Load after balancing" in page
    assert "Chosen together, layer 3" in page
    assert "Tokens with all experts the same as full precision" in page
    assert "Adjusting the router" not in report_page(documents())


def test_types_of_a_gguf_file_by_layer_and_projection() -> None:
    """llama.cpp gives no routing, so the evaluation has none; neighbouring layers of the same types share a row."""
    parts = {"attn_q": "q4_k", "ffn_down_exps": "q6_k"}
    types = {f"blk.{layer}.{part}.weight": kind for layer in range(4) for part, kind in parts.items()}
    types |= {"blk.3.ffn_down_exps.weight": "q8_0", "blk.4.attn_q.weight": "q4_k", "output.weight": "q6_k"}
    judged = evaluation(0)
    for text in judged["texts"].values():
        del text["routing_exact"], text["routing_overlap"]
    made = documents(evaluated=False)
    manifest = {**made.manifest, "plan": {"gguf": {"types": types, "wanted": {"blk.3.ffn_down_exps.weight": "q6_k"}}}}
    text = " ".join(Page(report_page(replace(made, manifest=manifest, evaluations=[judged]))).text.split())
    assert "layers attn_q ffn_down_exps 0–2 q4_k q6_k 3 q4_k q8_0 4 q4_k –" in text
    assert "Outside of the layers: output.weight q6_k ." in text.replace("q6_k.", "q6_k .")
    assert "In 1 tensors rows are not divided by the blocks of the type that was asked for" in text
    assert "Tokens with the same experts" not in text
    assert "Types" not in re.findall(r"<h2>(.*?)</h2>", report_page(documents()))


def test_the_shortest_report_and_one_of_a_dense_layer() -> None:
    least = facts.Documents("x", {"layers": [{"layer": 0}]}, {}, "")
    assert Page(report_page(least)).text
    assert Page(report_page(replace(least, report={}))).text


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>&"
    made = documents(name=evil)
    made.report["command"] = evil
    made.report["layers"][0]["linears"] = {evil: {"bits": 4, "weight_error": 0.1, "damping": None, "fallback": True}}
    made.report["layers"][0]["method"] = evil
    text = report_page(made)
    assert "<script" not in text
    assert evil in Page(text).text


def test_experts_of_a_large_model_are_named_worst_first() -> None:
    made = documents(layers=10, experts=256)
    made.report["layers"][4]["experts"]["down_proj"]["weight_error"][77] = 0.3
    rows = facts.layer_rows(made)
    assert {len(row.experts) for row in rows} == {facts.WORST}
    assert 77 in [row[0] for row in rows[4].experts]
    assert all(row.left_out == 256 - facts.WORST for row in rows)
    assert [len(row.experts) for row in facts.layer_rows(documents())] == [32] * 4


def test_contrast() -> None:
    """Text can be read in light and dark: 4.5 to 1 at least (WCAG AA); lines 3 to 1."""
    style = report_page(documents()).partition("<style>")[2].partition("</style>")[0]
    light, dark = (dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", block)) for block in re.findall(r":root \{(.*?)\}", style, flags=re.S))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for colours in (light, dark):
        for text in ("ink", "soft"):
            assert min(contrast(colours[text], colours[under]) for under in ("paper", "panel")) >= 4.5
        assert contrast(colours["ink"], colours["alarm-paper"]) >= 4.5
        assert min(contrast(colours[f"k{i}"], colours["paper"]) for i in range(6)) >= 3


# --- the verb


def test_quantize_writes_it_and_report_again(outputs: Outputs, tmp_path: Path) -> None:
    out = outputs.rtn(MIXTRAL, mixed=True)
    written = (out / "report.html").read_text(encoding="utf-8")
    document = json.loads((out / "report.json").read_text())
    assert document["size_after"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert document["peak_memory_bytes"] >= document["layers"][-1]["peak_memory_bytes"] > 10**7
    assert document["command"].startswith(f"moebit.quantize({outputs.checkpoints.path(MIXTRAL).name!r}, {out.name!r}, recipe={{")
    assert Page(written).text
    assert moebit.report(out, tmp_path / "again.html") == tmp_path / "again.html"
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written
    assert moebit.verify(out)["findings"] == []

    size = document["size_after"]
    (tmp_path / "e.json").write_text(json.dumps(evaluation(2, size_bytes=size, texts=("a-text-of-mine",))))
    moebit.report(out, tmp_path / "judged.html", evaluation=tmp_path / "e.json")
    judged = Page((tmp_path / "judged.html").read_text(encoding="utf-8")).text
    assert "a-text-of-mine" in judged
    assert "has not been measured" not in judged


def test_what_is_beside_the_weights_counts(tmp_path: Path) -> None:
    """An output with a side file takes the evaluation that `evaluate` makes of it, which counts all safetensors."""
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(7))
    (tmp_path / "switch.safetensors").write_bytes(bytes(5))
    (tmp_path / "e.json").write_text(json.dumps(evaluation(2, size_bytes=12)))
    assert len(facts.read_documents(tmp_path, [tmp_path / "e.json"]).evaluations) == 1
    (tmp_path / "e.json").write_text(json.dumps(evaluation(2, size_bytes=7)))
    with pytest.raises(BadInputError, match="whose weights are not those of"):
        facts.read_documents(tmp_path, [tmp_path / "e.json"])


def test_bad_input(outputs: Outputs, tmp_path: Path) -> None:
    out = outputs.rtn(MIXTRAL, mixed=True)
    with pytest.raises(BadInputError, match=r"no report\.json here; give the output"):
        moebit.report(outputs.checkpoints.path(MIXTRAL))
    (tmp_path / "e.json").write_text(json.dumps(evaluation(2, size_bytes=7)))
    with pytest.raises(BadInputError, match="whose weights are not those of"):
        moebit.report(out, tmp_path / "x.html", evaluation=[tmp_path / "e.json"])
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(BadInputError, match="no result of `moebit evaluate --json`"):
        moebit.report(out, tmp_path / "x.html", evaluation=[tmp_path / "e.json"])
    (tmp_path / "e.json").write_text("[1")
    with pytest.raises(BadInputError, match="not valid JSON"):
        moebit.report(out, tmp_path / "x.html", evaluation=[tmp_path / "e.json"])
    with pytest.raises(BadInputError, match="cannot be written"):
        moebit.report(out, tmp_path / "no" / "such" / "x.html")


def test_a_call_as_python() -> None:
    said = python_call("f", Path("a/b"), "out", recipe=None, text=["x=1.txt"], memory=(5, 4), device=("cpu", "cpu"), seed=(0, 0), flag=True)
    assert said == "f('a/b', 'out', text=['x=1.txt'], memory=5, flag=True)"
    assert eval(said, {"f": lambda *a, **k: (a, k)}) == (("a/b", "out"), {"text": ["x=1.txt"], "memory": 5, "flag": True})
