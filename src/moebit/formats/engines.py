"""Which engines can run an output, and why others cannot: known before the work, from what will be written.

The rules are those of transformers 5.23 and vLLM 0.32, read in their sources and checked by running them (benchmarks/formats.py,
benchmarks/vllm_cpu), and those of SGLang 0.5.23 and mlx-lm 0.32, read in their sources. An engine that would run something else than
what was written counts as one that cannot run it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moebit.errors import BadInputError
from moebit.formats.compressed_matrix import INT, PACKED, storage
from moebit.formats.native import PackedSpec
from moebit.formats.vllm_rules import built_whole
from moebit.model.experts import ExpertsLayout
from moebit.model.inputs import Activations
from moebit.model.structure import LayerSites, Structure

TRANSFORMERS, VLLM, SGLANG = "transformers", "vllm", "sglang"
ENGINES = (TRANSFORMERS, VLLM, SGLANG)
LLAMA = "llama.cpp"  # of GGUF files
MLX = "mlx"  # of MLX's own format
GPTQMODEL = "gptqmodel"  # of GPTQ and AWQ checkpoints, expert by expert
ANY = "any"
OWN_FORMATS = {
    LLAMA: "GGUF files; set format: gguf",
    MLX: "its own format; set format: mlx",
    GPTQMODEL: "GPTQ and AWQ checkpoints; set format: gptq or awq",
}
MARLIN_BITS = (4, 8)  # widths of vLLM's weight-only kernels that every CUDA build has
MARLIN_HIDDEN = 128  # what they want the hidden size of experts to be a multiple of

Modules = Mapping[str, Mapping[str, PackedSpec]]


@dataclass(frozen=True)
class Verdict:
    """Whether one engine runs an output.

    Attributes:
        reasons: why not; empty where it does. notes: what to know where it does.
    """

    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return not self.reasons

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {"runs": self.runs, "reasons": list(self.reasons), "notes": list(self.notes)}


def verdicts(
    output_format: str,
    modules: Modules,
    structure: Structure,
    merged: Collection[str] = (),
    activations: Activations | None = None,
) -> dict[str, Verdict]:
    """What each engine makes of an output.

    Args:
        output_format: of a recipe. modules: what is quantized, {"": spec} or {projection: spec}.
        merged: parameters that transformers puts together from stored tensors (`HubWeights.merged`).
        activations: what happens to inputs in the native format.
    """
    if output_format == "native":
        notes = ["with `import moebit`, which registers the format", *_native_notes(activations or Activations())]
        unknown = Verdict(("it does not know the native format",))
        return {TRANSFORMERS: Verdict(notes=tuple(notes)), VLLM: unknown, SGLANG: unknown}
    if output_format == "gguf":
        others = dict.fromkeys(ENGINES, Verdict(("it is given GGUF files only by conversion, which rounds again",)))
        return {**others, LLAMA: Verdict(notes=("and what is built on it: ollama, LM Studio",))}
    if output_format == "mlx":
        return {**dict.fromkeys(ENGINES, Verdict(("it does not know MLX's format",))), MLX: Verdict(notes=("mlx-lm, LM Studio",))}
    if output_format in ("gptq", "awq"):
        return _older(output_format, modules, structure)
    if output_format == "dense":
        return {engine: Verdict(notes=("like the checkpoint itself",)) for engine in ENGINES}
    return {
        TRANSFORMERS: Verdict(tuple(_transformers(modules, merged)), tuple(_transformers_notes(modules))),
        VLLM: Verdict(tuple(_vllm(modules, structure)), tuple(_vllm_notes(modules))),
        SGLANG: Verdict(tuple(_sglang(modules, structure)), tuple(_sglang_notes(modules))),
    }


def check_engine(engine: str, found: Mapping[str, Verdict]) -> None:
    """Refuse an output that the wanted engine cannot run, or, for `any`, that none can.

    Raises:
        BadInputError: with every reason; an unknown engine.
    """
    if engine not in (*ENGINES, *OWN_FORMATS, ANY):
        raise BadInputError(f"--engine {engine}: choose one of {', '.join((*ENGINES, *OWN_FORMATS, ANY))}")
    if engine not in (ANY, *found):
        raise BadInputError(f"--engine {engine} reads {OWN_FORMATS[engine]}")
    wanted = tuple(found) if engine == ANY else (engine,)
    if any(found[name].runs for name in wanted):
        return
    why = "; ".join(f"{name}: {', '.join(found[name].reasons)}" for name in wanted)
    raise BadInputError(
        f"{'no engine runs' if engine == ANY else f'{engine} cannot run'} this output. {why}. "
        "Change the recipe or the plan, or write the native or dense format"
    )


# --- the rules


def _older(output_format: str, modules: Modules, structure: Structure) -> dict[str, Verdict]:
    """GPTQ and AWQ checkpoints."""
    spec, name = _first(modules), output_format.upper()
    stacked = (f"it stacks experts, which its loader of {name} checkpoints does not fill",) if _experts(modules) else ()
    reasons = [*_alike(modules), *_fused(modules, structure)]
    reasons += [f"the experts of {n} have biases" for n, layout in _moe_layers(structure) if n in modules and layout.bias][:1]
    odd = sorted({part.bits[0] for parts in modules.values() for part in parts.values()} - set(MARLIN_BITS))
    if odd:
        reasons.append(f"it reads GPTQ experts of {' and '.join(map(str, MARLIN_BITS))} bits, not of {odd[0]}")
    if output_format == "gptq" and not spec.symmetric:
        reasons.append("it reads GPTQ experts with symmetric grids only; set weights.symmetric: true, or write format: awq")
    served = Verdict(tuple(reasons), ("by its sources; not run here",))
    needs = Verdict(stacked, (f"{name} checkpoints need GPTQModel installed beside it",))
    return {TRANSFORMERS: needs, VLLM: served, SGLANG: served, GPTQMODEL: Verdict(notes=("by the format; not run here",))}


def _native_notes(activations: Activations) -> Iterator[str]:
    if activations.inputs or activations.attention:
        yield "moebit's runtime rounds activations, which costs time: it shows what an engine with such products would compute"
    if activations.transforms:
        yield "inputs are rotated as it runs"


def _experts(modules: Modules) -> dict[str, Mapping[str, PackedSpec]]:
    return {name: parts for name, parts in modules.items() if "" not in parts}


def _alike(modules: Modules) -> Iterator[str]:
    """What both engines want: one width for all experts and projections of a layer."""
    for name, parts in _experts(modules).items():
        mixed = [projection for projection, spec in parts.items() if len(set(spec.bits)) > 1]
        if mixed:
            widths = sorted(set(parts[mixed[0]].bits))
            yield f"the experts of {name} have different widths ({mixed[0]}: {widths}), it takes one for all"
            return
        shown = ", ".join(f"{projection} {spec.bits[0]}" for projection, spec in parts.items())
        if len({spec.bits[0] for spec in parts.values()}) > 1:
            yield f"the projections of {name} have different widths ({shown}), it takes one for all"
            return


def _transformers(modules: Modules, merged: Collection[str]) -> Iterator[str]:
    experts = _experts(modules)
    yield from _alike(modules)
    whole = {name: next(iter(parts.values())).bits[0] for name, parts in experts.items()}
    if len(set(whole.values())) > 1:
        first = next(iter(whole.values()))
        other = next(name for name, bits in whole.items() if bits != first)
        yield f"the experts of {other} have {whole[other]} bits and others {first}, it reads all layers' experts with one width"
    kept = sorted(name for name in merged if name.rpartition(".")[0] not in modules)
    spec = _first(modules)
    if kept and not spec.float8:
        yield f"the stored tensors that it merges into {kept[0]} stay in full precision, it expects all such tensors packed"
    if experts and storage(spec) == INT:
        yield "it reads no int8 experts (int-quantized)"
    if experts and not spec.symmetric:
        yield "it reads no experts with zero points"
    if experts and spec.ggml == "nvfp4":
        yield "it leaves out the scale of the whole matrix of NVFP4 experts"
    if experts and spec.block_rows > 1:
        yield "it reads no experts with scales per block of rows and columns (compressed-tensors)"


def _transformers_notes(modules: Modules) -> Iterator[str]:
    if _experts(modules):
        yield "experts are dequantized when they are loaded"
        if _first(modules).input_bits != 16:
            yield "it rounds the inputs of linears and not those of experts"


def _vllm(modules: Modules, structure: Structure) -> Iterator[str]:
    experts = _experts(modules)
    yield from _alike(modules)
    yield from _fused(modules, structure)
    yield from built_whole(modules, structure)
    for name, layout in _moe_layers(structure):
        if name in experts:
            reason = _kernel(name, layout, next(iter(experts[name].values())))
            if reason:
                yield reason
                return
    for name, parts in modules.items():
        for spec in parts.values():
            if storage(spec) == PACKED and spec.shape[1] * spec.bits[0] % 32:
                yield f"a row of {name} ({spec.shape[1]} x {spec.bits[0]} bits) does not fill 32-bit words"
                return


def _kernel(name: str, layout: ExpertsLayout, spec: PackedSpec) -> str | None:
    """Why no kernel takes these experts."""
    if layout.bias:
        return f"the experts of {name} have biases, its packed experts have none"
    if storage(spec) != PACKED or spec.group_size != -1:
        return None
    if not spec.symmetric:
        return f"experts with zero points and one scale a channel ({name}), it wants groups"
    if spec.bits[0] not in MARLIN_BITS:
        return f"experts of {spec.bits[0]} bits with one scale a channel ({name}), it wants groups at other widths than {MARLIN_BITS}"
    if layout.hidden % MARLIN_HIDDEN:
        wanted = f"it wants a multiple of {MARLIN_HIDDEN} or groups"
        return f"experts with one scale a channel and a hidden size of {layout.hidden} ({name}), {wanted}"
    return None


def _fused(modules: Modules, structure: Structure) -> Iterator[str]:
    """vLLM joins linears that share their input (query, key and value; gate and up): they need one grid, or all none."""
    for layer in structure.layers:
        for group in layer.groups:
            names = [f"{layer.name}.{name}" for name in group.names]
            widths = {name: modules[name][""].bits[0] if name in modules else 16 for name in names}
            if len({modules[name][""].group_size for name in names if name in modules}) > 1:
                yield f"linears of {layer.name} that share an input have different group sizes, it joins them"
                return
            if len(set(widths.values())) > 1:
                shown = ", ".join(f"{name.rpartition('.')[2]} {bits}" for name, bits in widths.items())
                yield f"linears of {layer.name} that share an input have different widths ({shown}), it joins them"
                return


def _vllm_notes(modules: Modules) -> Iterator[str]:
    spec = _first(modules)
    other = sorted({part.bits[0] for parts in modules.values() for part in parts.values()} - set(_marlin_bits(spec)))
    if storage(spec) == PACKED and spec.input_bits == 16 and other:
        zeros = "" if spec.symmetric else " with zero points"
        yield f"{', '.join(map(str, other))} bits{zeros} need its Humming kernels (CUDA), which are installed beside it"
    if storage(spec) == PACKED and not spec.symmetric:
        yield "its kernels for CPUs have no zero points"
    if storage(spec) == PACKED and spec.input_float8:
        yield "integers with FP8 inputs need a GPU of compute capability 9.0"
    if spec.float8:
        yield "FP8 needs a GPU that multiplies it (compute capability 8.9 or later)"


def _marlin_bits(spec: PackedSpec) -> tuple[int, ...]:
    return MARLIN_BITS if spec.symmetric else MARLIN_BITS[:1]


def _sglang(modules: Modules, structure: Structure) -> Iterator[str]:
    experts, spec = _experts(modules), _first(modules)
    yield from _alike(modules)
    yield from _fused(modules, structure)
    for name, layout in _moe_layers(structure):
        if name in experts and layout.bias:
            yield f"the experts of {name} have biases, its packed experts have none"
            return
    odd = sorted({part.bits[0] for parts in modules.values() for part in parts.values()} - set(MARLIN_BITS))
    if storage(spec) == PACKED and odd:
        yield f"it reads packed integers of {' and '.join(map(str, MARLIN_BITS))} bits, not of {odd[0]}"
    if experts and storage(spec) == INT:
        yield "its experts with int8 inputs run on NPUs only"
    if storage(spec) == PACKED and spec.input_float8:
        yield "it reads integers with FP8 inputs in a format of its own only"
    if spec.ggml == "mxfp4" and len(experts) < len(modules):
        yield "it reads MXFP4 experts and no linears; set weights.scope: experts"


def _sglang_notes(modules: Modules) -> Iterator[str]:
    yield "by its sources; not run here"
    if _first(modules).float8:
        yield "FP8 needs a GPU that multiplies it (compute capability 8.9 or later)"


def _first(modules: Modules) -> PackedSpec:
    return next(iter(next(iter(modules.values())).values()))


def _moe_layers(structure: Structure) -> Iterator[tuple[str, ExpertsLayout]]:
    for layer in structure.layers:
        if layer.moe:
            yield _experts_name(layer), layer.moe.layout


def _experts_name(layer: LayerSites) -> str:
    assert layer.moe is not None
    return layer.experts
