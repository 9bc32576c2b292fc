"""What all sections of a recipe share."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

BIT_WIDTHS = (2, 3, 4, 5, 6, 8)


class Section(BaseModel):
    """A part of a recipe.

    Attributes:
        named_if_on: fields that are left out where they have their default, so that a recipe without them keeps its text and digest.
    """

    # Building a section's validator by itself takes as long as importing pydantic; only the whole recipe's is needed.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    named_if_on: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {
            key: value
            for key, value in handler(self).items()
            if key not in self.named_if_on or getattr(self, key) != fields[key].get_default(call_default_factory=True)
        }
