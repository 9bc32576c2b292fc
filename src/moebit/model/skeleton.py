"""A model without weights: transformers' own class on the meta device, of which single modules are filled and freed again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils import logging as transformers_logging

from moebit.errors import BadInputError
from moebit.model.adapters import adapt
from moebit.model.seam import SEAM
from moebit.storage.config import first_line
from moebit.storage.weights import Weights


def model_class(config: Any) -> type[PreTrainedModel]:
    """The transformers class that a configuration stands for: the one it names, if that is a language model; else the causal one.

    A wrapper around a language model (with towers for pictures or sound) is taken whole, so that its other weights are carried along.

    Raises:
        BadInputError: no language model for this configuration.
    """
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    known = [entry for entries in known for entry in (entries if isinstance(entries, tuple) else (entries,))]
    if not known:
        raise BadInputError(f"no causal language model for {config.model_type!r} in this transformers")
    named = getattr(config, "architectures", None) or []
    return next((entry for entry in known if entry.__name__ in named), known[0])


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model with every parameter on the meta device and its experts behind moebit's seam.

    Args:
        dtype: what layers will be computed in, whatever is stored. Parameters that the architecture insists on keeping in float32 stay so.

    Raises:
        BadInputError: no language model for this configuration; a computed buffer that stays undefined.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    chosen = model_class(config)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = chosen._from_config(config, experts_implementation=SEAM, dtype=dtype)
    except Exception as error:  # a model's own code fails on a wrong configuration in any way
        raise BadInputError(
            f"{chosen.__name__} cannot be built from this config.json ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.eval().requires_grad_(False)
    adapt(model)
    _keep_in_float32(model)
    _compute_buffers(model)
    return model


def _keep_in_float32(model: PreTrainedModel) -> None:
    """The parameters and stored buffers for which transformers insists on float32, whatever the model is loaded in."""
    kept = [re.compile(rf"(^|\.){pattern}(\.|$)".replace("*", ".*")) for pattern in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if tensor.dtype == torch.float32 or not tensor.is_floating_point() or not any(pattern.search(name) for pattern in kept):
            continue
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor.float(), requires_grad=False)
        else:
            owner._buffers[leaf] = tensor.float()


def _compute_buffers(model: PreTrainedModel) -> None:
    """Buffers that are computed rather than stored (rotary frequencies): filled by the model's own initialisation."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        value = torch.empty_like(buffer, device="cpu")
        owner._buffers[name.rpartition(".")[2]] = value.fill_(float("nan")) if value.is_floating_point() else value
        owners[name] = owner
    with torch.no_grad():
        for owner in {id(o): o for o in owners.values()}.values():
            model._init_weights(owner)
    for name in owners:
        value = model.get_buffer(name)
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise BadInputError(f"buffer {name!r} of {type(model).__name__} is computed in a way that moebit cannot repeat")


def place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move the buffers that are computed rather than stored to where layers are computed."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        if buffer.device != device:
            model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.to(device)


def materialize(module: nn.Module, prefix: str, weights: Weights, skip: Iterable[nn.Module] = (), recurse: bool = True) -> None:
    """Fill a skeleton module's parameters and buffers, in the types that the skeleton has.

    Submodules in `skip` (the experts) stay on meta, except for their own submodules' parameters (a norm after the experts). Without
    `recurse`, only the module's own tensors are filled.
    """
    skipped = {id(parameter) for other in skip for parameter in other.parameters(recurse=False)}
    for name, owner in module.named_modules() if recurse else [("", module)]:
        tables: Iterable[dict[str, Any]] = (owner._parameters, owner._buffers)
        for table in tables:
            for leaf, value in table.items():
                if value is None or id(value) in skipped or value.device.type != "meta":
                    continue
                full = ".".join(part for part in (prefix, name, leaf) if part)
                read = weights.parameter(full)
                read = read.to(value.dtype) if read.is_floating_point() else read
                table[leaf] = nn.Parameter(read, requires_grad=False) if table is owner._parameters else read


def dematerialize(module: nn.Module, recurse: bool = True) -> None:
    """Free a module's parameters and persistent buffers: back to meta."""
    for owner in module.modules() if recurse else [module]:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None and leaf not in owner._non_persistent_buffers_set:
                owner._buffers[leaf] = buffer.to("meta")
