"""What the documents that moebit reads may say: a schema for each kind, and one door for what libraries read by themselves.

Texts become data in recipe/reading.py; here the data becomes something that the rest of the house can rely on. A document that does not fit
is refused in one sentence that names the file, the place in it and the value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from moebit.errors import BadInputError, MoebitError, is_out_of_memory
from moebit.recipe.reading import read_object, read_text
from moebit.storage.places import is_plain

MOST_LAYERS = 10_000  # an order of magnitude above any model; how many there are is compared with what is stored before any is built
MOST = 2**31 - 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
TOKENIZER_DOCUMENTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
PANIC = "PanicException"  # of libraries written in Rust, such as tokenizers, which derive it from BaseException
Model = TypeVar("Model", bound=BaseModel)


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError("not the plain name of a file in this folder")
    return name


PlainName = Annotated[str, AfterValidator(_plain)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Width = Annotated[int, Field(strict=True, ge=1, le=16)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
ScaleType = Literal["float32", "float16", "bfloat16"]


class _Open(BaseModel):
    """Fields that are not named here are allowed, and nothing is said about them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ConfigFields(_Open):
    """Fields of config.json that moebit uses or whose nonsense makes building a model hang; in it and in the configurations inside it."""

    model_type: str | None = None
    architectures: list[str] | None = None
    hidden_size: Count | None = None
    vocab_size: Count | None = None
    intermediate_size: CountOrNone | list[CountOrNone] | None = None
    moe_intermediate_size: CountOrNone | list[CountOrNone] | None = None
    max_position_embeddings: Count | None = None
    num_hidden_layers: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    num_layers: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    n_layer: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    n_layers: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    num_nextn_predict_layers: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    depth: Annotated[int, Field(strict=True, ge=0, le=MOST_LAYERS)] | None = None
    num_labels: Annotated[int, Field(strict=True, ge=0, le=2**20)] | None = None
    num_attention_heads: CountOrNone | list[CountOrNone] | None = None
    num_key_value_heads: CountOrNone | list[CountOrNone] | None = None
    head_dim: Count | None = None
    num_experts: CountOrNone | list[CountOrNone] | None = None
    num_local_experts: CountOrNone | list[CountOrNone] | None = None
    n_routed_experts: CountOrNone | list[CountOrNone] | None = None
    num_experts_per_tok: CountOrNone | list[CountOrNone] | None = None
    sliding_window: Count | bool | None = None
    rms_norm_eps: Positive | None = None
    layer_norm_eps: Positive | None = None
    layer_norm_epsilon: Positive | None = None
    norm_eps: Positive | None = None
    rope_theta: Positive | dict[str, Any] | None = None
    routed_scaling_factor: Finite | None = None
    quantization_config: dict[str, Any] | None = None
    layer_types: Annotated[list[str], Field(max_length=MOST_LAYERS)] | None = None


class Index(_Open):
    """model.safetensors.index.json."""

    weight_map: dict[str, PlainName]
    metadata: dict[str, Any] | None = None


class _ProfiledSet(_Open):
    tokens: CountOrNone
    sha256: Sha256
    errors: bool


class _ProfiledModule(_Open):
    layer: CountOrNone
    scale_dtype: ScaleType
    experts: Count | None = None
    group: CountOrNone | None = None
    shape: tuple[Count, Count] | None = None
    projections: dict[str, tuple[Count, Count]] | None = None


class _Measured(_Open):
    widths: list[Width]


class ProfileFile(_Open):
    """profile.json."""

    version: int
    measured: _Measured
    sets: dict[PlainName, _ProfiledSet]
    modules: dict[str, _ProfiledModule]


class _Allocation(_Open):
    ladder: list[Width] = []


class _MadeFor(_Open):
    sets: dict[str, dict[str, Any]]
    allocation: _Allocation | None = None


class Sealed(_Open):
    """moebit.json."""

    files: dict[PlainName, Sha256]
    sha256: Sha256
    profile: _MadeFor | None = None


class GenerationSettings(_Open):
    """generation_config.json."""

    eos_token_id: Annotated[int, Field(strict=True)] | list[Annotated[int, Field(strict=True)]] | None = None


def checked(schema: type[Model], data: Any, where: str | Path, remedy: str = "write or copy it again") -> Model:
    """Data that fits a schema.

    Raises:
        BadInputError: naming the file, the place and the value.
    """
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise BadInputError(f"{where}: {_said(error)}; {remedy}") from error


def _said(error: ValidationError) -> str:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    value = repr(first.get("input"))
    value = value if len(value) <= 60 else value[:60] + "…"
    return f"{place[:200] or 'the document'}: {first['msg'].removeprefix('Value error, ')}, got {value}"


def check_config(raw: dict[str, Any], where: Path) -> None:
    """The fields of a configuration and of those inside it that moebit relies on.

    Raises:
        BadInputError: naming the field.
    """
    checked(ConfigFields, raw, where)
    experts = [raw[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if isinstance(raw.get(key), int)]
    chosen = raw.get("num_experts_per_tok")
    if isinstance(chosen, int) and any(experts) and not 1 <= chosen <= max(experts):
        raise BadInputError(f"{where}: num_experts_per_tok: {chosen} of {max(experts)} experts make no sense; copy it again")
    for key, value in raw.items():
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            check_config(value, where)


def check_layers(config: Any, stored: int, where: Path) -> None:
    """A model has no more layers than stored tensors: counted before any layer is built.

    Raises:
        BadInputError: naming both numbers.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > stored:
        raise BadInputError(f"{where}: config.json speaks of {layers} layers, and only {stored} tensors are stored; copy config.json again")


@contextmanager
def understood(where: str | Path, remedy: str = "copy it again") -> Iterator[None]:
    """What is read inside comes from this document; whatever goes wrong there is said about it, in one sentence.

    Raises:
        BadInputError: naming the document.
    """
    try:
        yield
    except (MoebitError, MemoryError, OSError):
        raise
    except BaseException as error:  # libraries that read a file by themselves raise what they like
        if is_out_of_memory(error) or (not isinstance(error, Exception) and type(error).__name__ != PANIC):
            raise
        raise BadInputError(f"{where}: cannot be understood ({type(error).__name__}: {one_line(error)}); {remedy}") from error


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of a message; libraries' own go on with lists and advice."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if len(lines[0]) <= limit else lines[0][:limit] + " …"


def read_checked(schema: type[Model], path: Path, what: str = "", remedy: str = "write or copy it again") -> Model:
    """A JSON document that fits a schema.

    Raises:
        BadInputError: naming the file and what is wrong with it.
    """
    return checked(schema, read_object(path, what, remedy=remedy), f"{what}{path}", remedy)


def load_tokenizer(path: Path) -> Any | None:
    """The checkpoint's tokenizer, or None where it has none. No code of the checkpoint is run.

    Raises:
        BadInputError: its files are damaged, or of a kind that the library does not read; naming the folder and the file.
    """
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        return None
    for name in TOKENIZER_DOCUMENTS:
        if (path / name).exists():
            read_object(path / name, infinite=True)
    for template in [*path.glob("*.jinja"), *path.glob("additional_chat_templates/*.jinja")]:
        read_text(template)
    with understood(f"{path}: its tokenizer", "copy the tokenizer's files again"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
