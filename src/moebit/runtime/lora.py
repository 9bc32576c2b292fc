"""LoRA on packed weights with PEFT (QLoRA: 2305.14314): the packed weights stay as they are, small matrices beside them are trained.

PEFT looks for layers by their class and lets a configuration name further ones. The layer here is PEFT's own for linears, over a
`PackedLinear`, whose gradients reach its input (`runtime/gradients.py`).
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear

from moebit.errors import BadInputError
from moebit.runtime.packed import PackedLinear


class PackedLora(Linear):
    """PEFT's layer for linears over a packed one, into which nothing can be merged: a sum would have to be rounded again."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            BadInputError: always, with what to do instead.
        """
        raise BadInputError(
            "an adapter cannot be merged into packed weights; keep it beside them, or merge it into the checkpoint or a dense output "
            "and quantize that"
        )


def lora_config(**arguments: Any) -> LoraConfig:
    """PEFT's `LoraConfig` with these arguments, which also finds packed linears.

    Experts and routers are no targets: what is packed of them is no linear.
    """
    config = LoraConfig(**arguments)
    config._register_custom_module({PackedLinear: PackedLora})
    return config
