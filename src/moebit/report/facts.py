"""What a report page says, from the JSON documents of an output: the summary, the warnings, and a row for every layer.

Everything is read with care for what may not be there: an output without calibration has no token counts, a dense layer no experts, and
methods add fields of their own (docs/report.md), which are shown where they are present.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebit import words
from moebit.errors import BadInputError
from moebit.recipe.reading import is_there, read_object, read_text

THIN = 0.1  # an expert with less than this part of an even share of the tokens is named
LARGE_ERROR = 0.5  # |dW|^2 / |W|^2 at which a matrix has lost its meaning; 2 bits have about 0.15
MANY = 0.1  # of the matrices that lost their meaning: from here on the model did, too
ROWS = 2000  # experts of which every one has a row of its own; of larger models each layer's worst are shown
WORST = 8
ENGINES = {True: "runs it", False: "cannot run it"}


@dataclass(frozen=True)
class Documents:
    """What an output says about itself.

    Attributes:
        name: of the directory. report, manifest: report.json and moebit.json. recipe: recipe.yaml as text.
        evaluations: documents of `moebit evaluate --json` about this output.
    """

    name: str
    report: Mapping[str, Any]
    manifest: Mapping[str, Any]
    recipe: str
    evaluations: Sequence[Mapping[str, Any]] = ()

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        return list(self.report.get("layers", ()))


def read_documents(out: Path, evaluations: Sequence[Path] = ()) -> Documents:
    """The documents of a finished output.

    Raises:
        BadInputError: not an output of `quantize`, a damaged document, an evaluation of another model.
    """
    if not is_there(out) or not out.is_dir() or not (out / "report.json").is_file():
        raise BadInputError(f"{out}: no report.json here; give the output of `moebit quantize`")
    recipe = out / "recipe.yaml"
    documents = Documents(
        out.resolve().name,
        _read(out / "report.json"),
        _read(out / "moebit.json") if (out / "moebit.json").is_file() else {},
        read_text(recipe) if recipe.is_file() else "",
        [_read(file) for file in evaluations],
    )
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in out.glob(kind))  # as `evaluate` counts
    for file, evaluation in zip(evaluations, documents.evaluations, strict=True):
        if not isinstance(evaluation.get("texts"), dict):
            raise BadInputError(f"{file}: no result of `moebit evaluate --json`")
        if evaluation.get("size_bytes") != size:
            raise BadInputError(f"{file}: evaluates {evaluation.get('model')}, whose weights are not those of {out}; give its evaluation")
    return documents


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, infinite=True)


ExpertRow = tuple[int, str, str, Sequence[str], str]  # expert, tokens, bits, errors by projection, note


@dataclass(frozen=True)
class LayerRow:
    """One layer on the page.

    Attributes:
        problems: what to know about it, as sentences. experts: those that are listed.
        left_out: how many experts are not.
    """

    layer: int
    experts_count: int
    tokens: tuple[int, float, int] | None
    errors: Mapping[str, float]
    linear_error: float | None
    bits: str
    routing_exact: float | None
    routing_overlap: float | None
    seconds: float
    peak: int | None
    problems: Sequence[str]
    linears: Sequence[tuple[str, int, float, str]]
    experts: Sequence[ExpertRow] = ()
    left_out: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float | None:
        """Mean over everything quantized in it."""
        values = [*self.errors.values(), *([self.linear_error] if self.linear_error is not None else [])]
        return statistics.fmean(values) if values else None


def short(projection: str) -> str:
    return projection.removesuffix("_proj")


def layer_rows(documents: Documents) -> list[LayerRow]:
    """A row for every decoder layer."""
    agreement = routing(documents)
    total = sum(len(layer.get("tokens_per_expert") or ()) or _experts(layer) for layer in documents.layers)
    return [_row(layer, agreement.get(layer["layer"]), every=total <= ROWS) for layer in documents.layers]


def _experts(layer: Mapping[str, Any]) -> int:
    return max((len(rows.get("bits", ())) for rows in layer.get("experts", {}).values()), default=0)


def _row(layer: Mapping[str, Any], agreement: Mapping[str, float] | None, every: bool) -> LayerRow:
    experts, linears = layer.get("experts", {}), layer.get("linears", {})
    tokens = list(layer.get("tokens_per_expert") or ())
    rows, left = _expert_rows(layer, every)
    bits = sorted({b for part in experts.values() for b in part.get("bits", ())} | {row["bits"] for row in linears.values()})
    return LayerRow(
        layer=layer["layer"],
        experts_count=_experts(layer) or len(tokens),
        tokens=(min(tokens), statistics.median(tokens), max(tokens)) if tokens else None,
        errors={name: _mean(part["weight_error"]) for name, part in experts.items()},
        linear_error=_mean([row["weight_error"] for row in linears.values()]) if linears else None,
        bits=f"{bits[0]}" if len(bits) == 1 else f"{bits[0]}–{bits[-1]}" if bits else "16",
        routing_exact=agreement.get("routing_exact") if agreement else None,
        routing_overlap=agreement.get("routing_overlap") if agreement else None,
        seconds=float(layer.get("seconds", 0.0)),
        peak=layer.get("peak_memory_bytes"),
        problems=_layer_problems(layer),
        linears=[
            (name, row["bits"], row["weight_error"], "rounded to nearest: no factorisation" if row.get("fallback") else "")
            for name, row in linears.items()
        ],
        experts=rows,
        left_out=left,
        extra=_extra(layer),
    )


def _mean(values: Sequence[float]) -> float:
    good = [v for v in values if math.isfinite(v)]
    return statistics.fmean(good) if good else math.nan


def _expert_rows(layer: Mapping[str, Any], every: bool) -> tuple[list[ExpertRow], int]:
    """(rows of experts, how many are left out): all of a small model's, the worst of a large one's."""
    parts, tokens = layer.get("experts", {}), layer.get("tokens_per_expert") or []
    total = _experts(layer)
    worst = sorted(range(total), key=lambda e: -max((_finite(part["weight_error"][e]) for part in parts.values()), default=0.0))
    chosen = range(total) if every else sorted(worst[:WORST])
    rows: list[ExpertRow] = []
    for e in chosen:
        fallen = [short(name) for name, part in parts.items() if part["fallback"][e]]
        note = f"{', '.join(fallen)} rounded to nearest" if fallen else "no tokens" if tokens and not tokens[e] else ""
        rows.append(
            (
                e,
                f"{tokens[e]:,}" if tokens else "–",
                "/".join(str(part["bits"][e]) for part in parts.values()),
                [words.plain(part["weight_error"][e]) for part in parts.values()],
                note,
            )
        )
    return rows, total - len(rows)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _layer_problems(layer: Mapping[str, Any]) -> list[str]:
    tokens, found = list(layer.get("tokens_per_expert") or ()), []
    unseen = [e for e, seen in enumerate(tokens) if not seen]
    if unseen:
        found.append(f"no calibration token reached {_named(unseen)}: calibrated on the layer's tokens")
    thin = [e for e, seen in enumerate(tokens) if 0 < seen < THIN * sum(tokens) / len(tokens)]
    if thin:
        found.append(f"less than a tenth of an even share of the tokens: {_named(thin)}")
    for name, part in layer.get("experts", {}).items():
        fallen = [e for e, fell in enumerate(part["fallback"]) if fell]
        if fallen:
            found.append(f"{short(name)} rounded to nearest, because no factorisation succeeded: {_named(fallen)}")
        large = [e for e, error in enumerate(part["weight_error"]) if not error < LARGE_ERROR]
        if large:
            found.append(f"{short(name)} lost more than half of its weight: {_named(large)}")
    fallen_linears = [name for name, row in layer.get("linears", {}).items() if row.get("fallback")]
    if fallen_linears:
        found.append(f"rounded to nearest, because no factorisation succeeded: {', '.join(fallen_linears)}")
    return found


def _named(experts: Sequence[int], most: int = 12) -> str:
    """experts 3, 7 and 4 more."""
    what = "expert" if len(experts) == 1 else "experts"
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return f"{what} {', '.join(map(str, experts[:most]))}{more}"


def _extra(layer: Mapping[str, Any]) -> dict[str, str]:
    """Numbers that methods put into a layer's report besides the known ones, as they are."""
    known = {"layer", "linears", "experts", "tokens_per_expert", "seconds", "peak_memory_bytes"}
    return {
        key.replace("_", " "): value if isinstance(value, str) else json.dumps(value)
        for key, value in _flat(layer)
        if key not in known and _small(value)
    }


def _flat(layer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of a section with several kinds of values one by one."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and key not in ("linears", "experts") and not _small(value):
            yield from ((f"{key} {inner}", item) for inner, item in value.items())
        else:
            yield key, value


def _small(value: Any) -> bool:
    """Whether it can be shown in a line: no lists, nothing empty."""
    if isinstance(value, Mapping):
        return 0 < len(value) <= 6 and all(isinstance(v, int | float | str) for v in value.values())
    return isinstance(value, int | float | str) and value != ""


def routing(documents: Documents) -> dict[int, dict[str, float]]:
    """Layer -> routing agreement with the reference, mean over the evaluated texts."""
    found: dict[int, list[Mapping[str, float]]] = {}
    for evaluation in documents.evaluations:
        for text in evaluation["texts"].values():
            for row in text.get("per_layer", ()):
                found.setdefault(row["layer"], []).append(row)
    keys = ("routing_exact", "routing_overlap")
    return {layer: {key: statistics.fmean(row[key] for row in rows) for key in keys} for layer, rows in found.items()}


# --- for everybody


def summary(documents: Documents) -> list[tuple[str, str, str]]:
    """(what, value, remark), the page's first lines."""
    report, plan = documents.report, documents.manifest.get("plan", {})
    before, after = report.get("size_before"), report.get("size_after", plan.get("size_bytes"))
    rows = []
    if before and after:
        rows.append(("Size", words.size(after), f"{before / after:.2f} × smaller than {words.size(before)}"))
    if "average_bits" in report:
        rows.append(("Bits per quantized weight", words.plain(report["average_bits"], 4), "codes, scales and zero points"))
    if "original" in report:
        rows.append(("The original", "itself quantized", report["original"]))
    kl = [text["kl"] for one in documents.evaluations for text in one["texts"].values() if "kl" in text]
    same = [text["routing_exact"] for one in documents.evaluations for text in one["texts"].values() if "routing_exact" in text]
    if kl:
        texts = words.count(len(kl), "text")
        rows.append(("Distance from the original", words.plain(1000 * statistics.fmean(kl)), f"KL × 1000, nats per token, mean of {texts}"))
    if same:
        rows.append(("Tokens with the same experts", words.share(statistics.fmean(same)), "as the original chooses"))
    errors = [row.mean_error for row in layer_rows(documents) if row.mean_error is not None]
    if errors and not kl:
        rows.append(("Error of the weights", words.plain(statistics.fmean(errors)), "|ΔW|² / |W|², mean over layers"))
    peak = report.get("peak_memory_bytes")
    if "seconds" in report:
        remark = f"and at most {words.size(peak)} of memory" if peak else ""
        rows.append(("Work", words.duration(report["seconds"]), remark))
    return rows


def engines(documents: Documents) -> list[tuple[str, bool, str]]:
    """(engine, whether it runs the output, why or with what)."""
    found = documents.manifest.get("plan", {}).get("engines", {})
    return [(name, bool(v["runs"]), "; ".join(v["notes"] if v["runs"] else v["reasons"])) for name, v in found.items()]


def warnings(documents: Documents) -> list[str]:
    """What somebody should know before the model is used, gravest first."""
    return list(_warnings(documents))


def _warnings(documents: Documents) -> Iterator[str]:
    layers, plan = documents.layers, documents.manifest.get("plan", {})
    parts = [(layer, part) for layer in layers for part in layer.get("experts", {}).values()]
    rows = [row for layer in layers for row in layer.get("linears", {}).values()]
    broken = sum(not error < LARGE_ERROR for _, part in parts for error in part["weight_error"])
    broken += sum(not row["weight_error"] < LARGE_ERROR for row in rows)
    if broken:
        total = sum(len(part["weight_error"]) for _, part in parts) + len(rows)
        what = (
            "such a model is likely to be useless"
            if broken > MANY * total
            else "harmless only if few tokens meet them, which an evaluation tells"
        )
        yield f"{words.count(broken, 'matrix')} of {total:,} lost more than half of the weights' energy: {what}."
    if plan.get("unquantized_expert_share"):
        yield f"{words.share(plan['unquantized_expert_share'])} of the expert parameters stay in full precision."
    fallen = sum(map(bool, (f for _, part in parts for f in part["fallback"]))) + sum(bool(row.get("fallback")) for row in rows)
    if fallen:
        yield f"{words.count(fallen, 'matrix')} fell back to rounding to nearest, because no factorisation succeeded."
    tokens = [seen for layer in layers for seen in layer.get("tokens_per_expert") or ()]
    if unseen := sum(not seen for seen in tokens):
        yield (
            f"No calibration token reached {words.count(unseen, 'expert')} of {len(tokens):,}; "
            "they were calibrated on their layer's tokens. More varied text reaches more of them."
        )
    if plan.get("peak_memory_bytes", 0) > plan.get("memory", math.inf):
        yield f"The smallest pieces of this model need more than --memory: {words.size(plan['peak_memory_bytes'])} were planned."
    found = engines(documents)
    if found and not any(runs for _, runs, _ in found):
        yield "No known engine runs this output."
    if not documents.evaluations:
        yield (
            "How far the result is from the original has not been measured. "
            "`moebit evaluate OUT --against MODEL --text FILE --json E.json` does; `moebit report OUT --evaluation E.json` puts it here."
        )


def quality(documents: Documents) -> list[tuple[str, ...]]:
    """A row for every evaluated text: name, tokens, perplexity, KL × 1000, same top token, same experts."""
    rows: list[tuple[str, ...]] = []
    for evaluation in documents.evaluations:
        for name, text in evaluation["texts"].items():
            compared = "kl" in text
            rows.append(
                (
                    name,
                    f"{text['tokens']:,}",
                    words.plain(text["perplexity"], 4),
                    words.plain(1000 * text["kl"]) if compared else "–",
                    words.share(text["top1_agreement"]) if compared else "–",
                    words.share(text["routing_exact"]) if "routing_exact" in text else "–",
                )
            )
    return rows


def kept(documents: Documents) -> list[tuple[str, int, str]]:
    """What stays in full precision: (reason, how many modules, the first of them)."""
    reasons: dict[str, list[str]] = {}
    for name, reason in documents.manifest.get("plan", {}).get("kept", {}).items():
        reasons.setdefault(reason, []).append(name)
    return [(reason, len(names), names[0]) for reason, names in reasons.items()]
