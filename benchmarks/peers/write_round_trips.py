"""Checkpoints that other libraries write, and what their own code says the weights are. Started by round_trips.py.

    python write_round_trips.py SOURCE OUT

It runs in an environment that has the libraries. SOURCE is a plain checkpoint of one safetensors file. Every case makes OUT/CASE with
config.json, model.safetensors and expected.safetensors: the weights under the names of SOURCE as the library dequantizes them.
OUT/cases.json says which cases were made, with which version, and why others were not.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Packed = tuple[Tensors, Tensor]
GROUP = 32
CASES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {}


def case(name: str, package: str) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    def add(function: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        CASES[name] = (package, function)
        return function

    return add


def is_projection(name: str) -> bool:
    return "_proj" in name and name.endswith(".weight")


def write(source: Path, out: Path, pack: Callable[[str, Tensor], Packed], declared: dict[str, Any]) -> None:
    """A checkpoint with every projection packed; `pack` gives the stored tensors by their leaf, and the values."""
    stored, expected = Tensors(), Tensors()
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_projection(name):
            leaves, value = pack(name, tensor)
            owner = name.removesuffix("weight")
            stored |= {f"{owner}{leaf}": part.contiguous() for leaf, part in leaves.items()}
            expected[name] = value.contiguous()
        else:
            stored[name] = expected[name] = tensor
    finish(source, out, stored, expected, declared)


def finish(source: Path, out: Path, stored: Tensors, expected: Tensors, declared: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, out / "expected.safetensors")


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32)
    layer.weight.data = weight.float()
    return layer


def grid(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """float16 scales and whole zero points [out, groups] between the least and the largest weight of a group."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half().float()
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    scale = ((high - low) / (2**bits - 1)).half().float()
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


# --- bitsandbytes


def _blocks(kind: str, nested: bool) -> Callable[[Path, Path], None]:
    def make(source: Path, out: Path) -> None:
        import bitsandbytes

        def pack(name: str, tensor: Tensor) -> Packed:
            layer = bitsandbytes.nn.Linear4bit(
                tensor.shape[1], tensor.shape[0], bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=torch.bfloat16
            )
            layer.load_state_dict({"weight": tensor})
            layer = layer.to("cpu")
            state = layer.weight.quant_state
            return dict(layer.state_dict()), bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)

        write(source, out, pack, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind})

    return make


for _kind in ("nf4", "fp4"):
    for _nested in (False, True):
        case(f"bitsandbytes {_kind}{', double quantization' if _nested else ''}", "bitsandbytes")(_blocks(_kind, _nested))


@case("bitsandbytes int8", "bitsandbytes")
def _int8(source: Path, out: Path) -> None:
    import bitsandbytes

    def pack(name: str, tensor: Tensor) -> Packed:
        layer = bitsandbytes.nn.Linear8bitLt(tensor.shape[1], tensor.shape[0], bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(tensor.half(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        leaves = dict(layer.state_dict())
        if "SCB" not in leaves:
            codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(tensor.half())
            leaves = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return leaves, bitsandbytes.functional.int8_vectorwise_dequant(leaves["weight"], leaves["SCB"]).bfloat16()

    write(source, out, pack, {"quant_method": "bitsandbytes", "load_in_8bit": True})


# --- GPTQ and AWQ


def _gptq(bits: int, symmetric: bool, kind: str, scattered: bool = False) -> Callable[[Path, Path], None]:
    def make(source: Path, out: Path) -> None:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        def pack(name: str, tensor: Tensor) -> Packed:
            layer = TorchLinear(
                bits=bits, group_size=GROUP, sym=symmetric, desc_act=scattered, in_features=tensor.shape[1], out_features=tensor.shape[0]
            )
            scale, zero = grid(tensor, bits, symmetric)
            index = torch.arange(tensor.shape[1], dtype=torch.int32) // GROUP
            if scattered:
                index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(len(name)))]
            layer.pack_original(linear(tensor), scale, zero, index)
            layer.qzero_format(format=2)
            layer.post_init()
            value = layer.dequantize_weight().T.clone()
            if kind == "gptq":
                convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            leaves = {leaf: getattr(layer, leaf).clone() for leaf in ("qweight", "qzeros", "scales", "g_idx")}
            return leaves, value.half()

        declared = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": symmetric, "desc_act": scattered}
        write(source, out, pack, {**declared, "checkpoint_format": kind})

    return make


for _bits in (2, 3, 4, 8):
    case(f"GPTQ {_bits} bits, symmetric, version 1", "gptqmodel")(_gptq(_bits, True, "gptq"))
    case(f"GPTQ {_bits} bits, asymmetric, version 2", "gptqmodel")(_gptq(_bits, False, "gptq_v2"))
case("GPTQ 4 bits, asymmetric, version 1", "gptqmodel")(_gptq(4, False, "gptq"))
case("GPTQ 4 bits, activation order", "gptqmodel")(_gptq(4, False, "gptq_v2", scattered=True))


@case("AWQ gemm", "autoawq")
def _awq(source: Path, out: Path) -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    def pack(name: str, tensor: Tensor) -> Packed:
        scale, zero = grid(tensor, 4, False)
        layer = WQLinear_GEMM.from_linear(linear(tensor).half(), 4, GROUP, scales=scale.T.half().contiguous(), zeros=zero.T.contiguous())
        leaves = {leaf: getattr(layer, leaf) for leaf in ("qweight", "qzeros", "scales")}
        return leaves, dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, GROUP).T

    write(source, out, pack, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True})


def _auto_round(bits: int, packing: str, module: str) -> Callable[[Path, Path], None]:
    def make(source: Path, out: Path) -> None:
        kind = __import__(f"auto_round_extension.torch.{module}", fromlist=["QuantLinear"]).QuantLinear

        def pack(name: str, tensor: Tensor) -> Packed:
            scale, zero = grid(tensor, bits, False)
            layer = kind(bits, GROUP, tensor.shape[1], tensor.shape[0], False)
            layer.device = "cpu"
            layer.pack(linear(tensor), scale, zero.clamp(min=1), None, device="cpu")
            leaves = {leaf: getattr(layer, leaf).clone() for leaf in ("qweight", "qzeros", "scales")}
            layer.post_init()
            return leaves, layer(torch.eye(tensor.shape[1])).T.half()

        declared = {"quant_method": "auto-round", "bits": bits, "group_size": GROUP, "sym": False, "data_type": "int"}
        write(source, out, pack, {**declared, "packing_format": packing})

    return make


for _bits in (2, 3, 4, 8):
    case(f"auto-round {_bits} bits, auto_round:auto_gptq", "auto-round")(_auto_round(_bits, "auto_round:auto_gptq", "qlinear_torch_zp"))
case("auto-round 4 bits, auto_round", "auto-round")(_auto_round(4, "auto_round", "qlinear_torch"))


# --- ModelOpt


@case("ModelOpt NVFP4", "nvidia-modelopt")
def _nvfp4(source: Path, out: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def pack(name: str, tensor: Tensor) -> Packed:
        packed, scale, shared = NVFP4QTensor.quantize(tensor, 16)
        value = packed.dequantize(torch.float32, scale=scale, double_scale=shared, block_sizes={-1: 16})
        leaves = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": shared, "input_scale": torch.tensor(1.0)}
        return leaves, value.bfloat16()

    write(source, out, pack, {"quant_method": "modelopt", "quant_algo": "NVFP4"})


# --- llm-compressor: whole models


def _compressor(scheme: str) -> Callable[[Path, Path], None]:
    def make(source: Path, out: Path) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modeling.moe.linearize import linearize_moe
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from transformers import AutoModelForCausalLM

        model = linearize_moe(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*mlp.gate$"]))
        model.save_pretrained(out, save_compressed=True)
        declared = json.loads((out / "config.json").read_text())["quantization_config"]
        (group,) = declared["config_groups"].values()
        kind = group.get("format") or declared["format"]
        library = BaseCompressor.get_value_from_registry(kind)
        plan = QuantizationScheme(targets=["Linear"], weights=group["weights"])
        expected, modules = Tensors(), dict[str, Tensors]()
        for name, tensor in load_file(out / "model.safetensors").items():
            owner, _, leaf = name.rpartition(".")
            modules.setdefault(owner, {})[leaf] = tensor
        for owner, leaves in modules.items():
            if "weight_scale" in leaves:
                expected[f"{owner}.weight"] = library.decompress(leaves, plan)["weight"].bfloat16().contiguous()
            else:
                expected |= {f"{owner}.{leaf}": tensor for leaf, tensor in leaves.items()}
        save_file(expected, out / "expected.safetensors")

    return make


for _scheme in ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16"):
    case(f"llm-compressor {_scheme}", "llmcompressor")(_compressor(_scheme))


# --- mlx-lm: whole models


def _mlx(bits: int | None, mode: str, group: int) -> Callable[[Path, Path], None]:
    def make(source: Path, out: Path) -> None:
        import mlx.core as mx
        import numpy
        from mlx_lm import convert

        convert(str(source), str(out), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode)
        stored = mx.load(str(out / "model.safetensors"))
        settings = json.loads((out / "config.json").read_text())["quantization"]
        expected = Tensors()
        for name, tensor in stored.items():
            owner, _, leaf = name.rpartition(".")
            if f"{owner}.scales" in stored and leaf != "weight":
                continue
            if f"{owner}.scales" in stored:
                own = settings.get(owner) or settings
                how = {"group_size": own["group_size"], "bits": own["bits"], "mode": own.get("mode", "affine")}
                parts = [stored[f"{owner}.scales"], stored.get(f"{owner}.biases")]
                # in float32, where the library computes in the scales' type and rounds twice
                parts = [part if part is None or part.dtype == mx.uint8 else part.astype(mx.float32) for part in parts]
                tensor = mx.dequantize(tensor, *parts, **how, **({} if own.get("mode", "affine") == "affine" else {"dtype": mx.float32}))
            value = torch.from_numpy(numpy.array(tensor.astype(mx.float32))).bfloat16()
            block, stack, rest = name.partition(".switch_mlp.")
            if stack:
                expected |= {f"{block}.experts.{number}.{rest}": matrix.contiguous() for number, matrix in enumerate(value)}
            else:
                expected[name] = value
        save_file(expected, out / "expected.safetensors")

    return make


for _bits in (2, 3, 4, 5, 6, 8):
    case(f"mlx-lm affine {_bits} bits", "mlx-lm")(_mlx(_bits, "affine", GROUP))
case("mlx-lm mxfp4", "mlx-lm")(_mlx(4, "mxfp4", 32))
case("mlx-lm nvfp4", "mlx-lm")(_mlx(4, "nvfp4", 16))
case("mlx-lm mxfp8", "mlx-lm")(_mlx(8, "mxfp8", 32))


def names() -> Iterator[tuple[str, str]]:
    for name in CASES:
        yield name, "".join(letter if letter.isalnum() else "-" for letter in name)


def main(source: str, out: str) -> None:
    made: dict[str, dict[str, str]] = {}
    for name, folder in names():
        package, function = CASES[name]
        try:
            function(Path(source), Path(out) / folder)
            made[name] = {"folder": folder, "by": f"{package} {version(package)}"}
        except Exception as error:  # whatever a library raises here is what the table says
            traceback.print_exc()
            made[name] = {"by": package, "why": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
    (Path(out) / "cases.json").write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
