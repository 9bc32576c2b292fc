"""The `moebit` quantization method for transformers' `from_pretrained`.

This is loaded while transformers itself is still being imported (`moebit.registration`), so it imports from transformers only what the
registry has loaded already, and from moebit only constants; what the methods need is imported when they run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moebit.formats.names import ACTIVATIONS, EXPERTS_IMPLEMENTATION, METHOD


def _experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Packed experts; a model that has some has loaded `moebit.runtime.packed`, which registers its own function instead of this one."""
    from moebit.runtime.packed_experts import packed_experts_forward

    return packed_experts_forward(module, hidden_states, top_k_index, top_k_weights)


if EXPERTS_IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)


def _names_in(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Stored module names -> those in this model: the same, or without the wrapper or the model with a head that the checkpoint has."""
    from moebit.formats.class_names import in_every_class

    known = {name for name, _ in model.named_modules()}
    return {name: next((each for each in in_every_class(name) if each in known), name) for name in names}


@register_quantization_config(METHOD)
class MoebitConfig(QuantizationConfigMixin):
    """`quantization_config` of a native output, as docs/format.md specifies it."""

    def __init__(self, modules: dict[str, Any] | None = None, format_version: int = 1, quant_method: str = METHOD, **kwargs: Any) -> None:
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = modules or {}
        if kwargs.get(ACTIVATIONS):
            self.activations = kwargs[ACTIVATIONS]


@register_quantizer(METHOD)
class MoebitQuantizer(HfQuantizer):
    """Puts packed modules in place of linears and experts before the weights are loaded."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        from moebit.formats.native import packed_specs

        packed_specs(self.quantization_config.to_dict())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """A native output names its tensors as the module does; the language model of a wrapper may also be loaded by itself."""
        from moebit.formats.native import packed_specs
        from moebit.storage.conversion import INSIDE, without_wrapper

        names = _names_in(model, packed_specs(self.quantization_config.to_dict()))
        return (
            [without_wrapper()]
            if any(INSIDE in stored.split(".") and INSIDE not in name.split(".") for stored, name in names.items())
            else []
        )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from moebit.formats.inputs_config import read_activations
        from moebit.formats.native import packed_specs
        from moebit.formats.overlay import overlay_specs
        from moebit.model.adapters import adapt
        from moebit.model.inputs import attach
        from moebit.model.seam import SEAM
        from moebit.runtime.packed import PackedLinear
        from moebit.runtime.packed_experts import pack_experts

        if getattr(model.config, "_experts_implementation", None) not in (EXPERTS_IMPLEMENTATION, SEAM):
            model.set_experts_implementation(EXPERTS_IMPLEMENTATION)  # type: ignore[operator]
        adapt(model)
        specs, overlays = packed_specs(self.quantization_config.to_dict()), overlay_specs(self.quantization_config.to_dict())
        names = _names_in(model, specs)
        for stored, parts in specs.items():
            name = names[stored]
            module, (parent, _, leaf) = model.get_submodule(name), name.rpartition(".")
            if "" not in parts:
                pack_experts(module, name, parts, overlays.get(stored))
                block: Any = model.get_submodule(parent)
                if not block._parameters and not block._buffers:
                    block._is_hf_initialized = True  # some blocks initialise their experts' weights, which are not there
                continue
            dtype = module.weight.dtype if isinstance(module.weight, torch.Tensor) else torch.bfloat16
            setattr(model.get_submodule(parent), leaf, PackedLinear(parts[""], module.bias is not None, dtype))
        activations = read_activations(self.quantization_config.to_dict())
        inside = names | _names_in(model, [*(n.rpartition(".")[0] for n in activations.transforms), *activations.attention_modules])
        attach(model, activations, specs, inside.__getitem__)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.config.experts_implementation = EXPERTS_IMPLEMENTATION  # type: ignore[union-attr] # kept by save_pretrained: see formats/sink.py
        return model

    def get_weight_conversions(self) -> list[Any]:
        return []

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it: gradients pass through packed weights (`runtime/gradients.py`)."""
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        return True
