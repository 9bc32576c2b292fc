"""`calibration`: what the model is calibrated on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moebit.recipe.section import Section

MOST_BALANCE = 1e6


class CalibrationSection(Section):
    """What the model is calibrated on: `samples` windows of `seq_len` tokens, spread evenly over the given texts, or sampled by itself.

    kind: `text`; or what the model writes (calibration/sampling.py): `ebss`, `self`, `self-balanced`. Text that is given all the same
        takes its place, unless `text_share` says how much of the set it is to be.
    width, temperature, scope, extend, oversample, repetition_penalty, no_repeat_ngram: of the sampling; null is the kind's own value.
    coverage: what the Hessians of experts with few tokens are drawn towards (gptq): `layer`, that of all its tokens, or `soft`, of tokens
        as likely as the router would have sent them there (methods/soft_coverage.py).
    balance: experts with fewer than `balance k seq_len / E` tokens draw further windows for themselves (methods/balance.py); `none`, or
        the ratio. pool: there are at most so many times `samples` of those.
    bos: `auto` puts in front of every document of text what the tokenizer puts there by itself; `none`, nothing.
    pack: windows are cut from a text's documents one after the other; false takes the beginning of documents that are long enough.
    """

    named_if_on = frozenset({"coverage", "bos", "pack"})

    kind: Literal["text", "ebss", "self", "self-balanced"] = "text"
    samples: int = Field(128, ge=1, le=2**24)
    seq_len: int = Field(512, ge=8, le=2**20)
    coverage: Literal["layer", "soft"] = "layer"
    balance: float | str = "none"
    pool: int = Field(4, ge=1, le=1024)
    bos: Literal["auto", "none"] = "auto"
    pack: bool = True

    text_share: float = Field(0.0, ge=0.0, lt=1.0)
    width: int = Field(4, ge=1, le=1024)
    temperature: float | None = Field(None, gt=0.0, le=1e6)
    scope: Literal["set", "sequence"] = "set"
    extend: Literal["likeliest", "sampled"] | None = None
    oversample: int = Field(3, ge=1, le=1024)
    repetition_penalty: float | None = Field(None, ge=1.0, le=100.0)
    no_repeat_ngram: int | None = Field(None, ge=0, le=1024)

    @field_validator("balance", mode="before")
    @classmethod
    def _ratio(cls, balance: Any) -> Any:
        number = isinstance(balance, int | float) and not isinstance(balance, bool) and 0 < balance <= MOST_BALANCE
        if balance != "none" and not number:
            raise ValueError(f"{balance!r}: a positive ratio like 2, or none")
        return float(balance) if number else balance

    @model_validator(mode="after")
    def _further_windows_are_packed(self) -> CalibrationSection:
        if not self.pack and self.balance != "none":
            raise ValueError("balance draws further windows of packed text; set pack: true or balance: none")
        return self

    @model_validator(mode="after")
    def _only_what_the_kind_knows(self) -> CalibrationSection:
        sampling = {"text_share", "temperature", "repetition_penalty", "no_repeat_ngram"}
        known = {
            "text": set[str](),
            "self": sampling,
            "self-balanced": sampling | {"oversample"},
            "ebss": sampling | {"width", "scope", "extend"},
        }
        for key in (*sorted(sampling), "width", "scope", "extend", "oversample"):
            if key not in known[self.kind] and getattr(self, key) != type(self).model_fields[key].default:
                kinds = ", ".join(kind for kind, keys in known.items() if key in keys)
                raise ValueError(f"{key} is of no use with kind: {self.kind}; leave it out, or set kind to one of {kinds}")
        return self
