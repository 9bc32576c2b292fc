"""Tiny checkpoints that llama.cpp's converter takes, the logits of their GGUF files, and what transformers says to the same weights."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from moebit.evaluate.llama import open_llama
from moebit.formats.gguf.converter import Converter, stored_tensors
from moebit.formats.gguf.read import read_gguf, restore
from moebit.formats.gguf.rows import Rows, find_rows
from moebit.formats.gguf.write import write_gguf
from tests.support.architectures import TINY
from tests.support.models import ARCHITECTURES, EXPERTS, HIDDEN, Architecture, quiet, random_model, save

VOCABULARY = 320
LENGTH = 24
PRE = "gpt-2"  # what the tokenizer made here is: a byte-level BPE with GPT-2's splitting
# Some converters look tokens up by their names and give their numbers special roles.
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<unk>", "<s>", "</s>"]
TEXTS = ["Hello, world! It's 1234 kg.", "  two  spaces\n\nand lines\t", "naïve café — 東京 😀", "x = foo(bar[3]); // don't"]
# Sizes that ggml's blocks of 256 divide, where a configuration has the field.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "shared_intermediate_size": 256,
    "prefix_dense_intermediate_size": 256,
    "dense_intermediate_size": 256,
}


@dataclass(frozen=True)
class Case:
    """One architecture as the table of GGUF has it.

    Attributes:
        model_type: an entry of tests/support/architectures.py.
        changes: what differs from the configuration there, because llama.cpp does not have it, or because real configurations say more.
        why: what is left out with them.
        large: whether the rows are multiples of 256.
        architectures: the class that the config.json of published checkpoints names, where transformers now writes another.
        published: further entries of config.json that published checkpoints have and transformers does not write.
        fails: whether llama.cpp computes something else, for the reason in `why`.
        sentencepiece: whether the converter wants a tokenizer.model.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    large: bool = True
    architectures: str = ""
    published: Mapping[str, Any] = field(default_factory=dict)
    fails: bool = False
    sentencepiece: bool = False

    @property
    def architecture(self) -> Architecture:
        if self.model_type in ARCHITECTURES:
            return ARCHITECTURES[self.model_type]
        tiny = TINY[self.model_type]
        return Architecture(tiny.model_type, tiny.model_type, tiny.config)

    def model(self) -> PreTrainedModel:
        """The model with random weights in float32, no router's choice hanging on rounding."""
        config = self.architecture.config
        sizes = {key: value for key, value in SIZES.items() if self.large and (key in config or key == "hidden_size")}
        model = random_model(self.architecture, vocab_size=VOCABULARY, **{**sizes, **self.changes}).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if self.large and parameter.shape == (EXPERTS, SIZES["hidden_size"]):
                    parameter.mul_((HIDDEN / SIZES["hidden_size"]) ** 0.5)  # or a sigmoid's scores are all 1, and ties decide
        return model


def byte_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens, learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(
        [*TEXTS, "the quick brown fox and the other thing " * 3, "one two three four five six seven " * 3], trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def checkpoint_of(case: Case, directory: Path) -> tuple[Path, PreTrainedModel]:
    """The case's checkpoint with a tokenizer, and its model."""
    save(case.model(), directory)
    model = loaded(directory)  # not the one that was saved: its tables of positions were made in the type of its weights
    byte_tokenizer().save_pretrained(directory)
    if case.sentencepiece:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    if case.architectures:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **case.published, "architectures": [case.architectures]}))
    return directory, model


def sentencepiece_model() -> bytes:
    """A SentencePiece BPE with fallback to bytes, for converters that read nothing else."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def token_windows(count: int = 3) -> Tensor:
    """int64 [count, LENGTH] random tokens."""
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """float32 [count, LENGTH, V]."""
    with quiet():
        return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]


def llama_logits(file: Path, ids: Tensor, library: Path | None = None) -> Tensor:
    with open_llama(file, ids.shape[1], library=library) as llama:
        return torch.stack([llama.logits(window) for window in ids])


def write_plain(converter: Converter, checkpoint: Path, path: Path, file_type: str = "ALL_F32", rows: Rows | None = None) -> Rows:
    """The checkpoint through moebit's writer in one of the converter's types; what is computed from the weights stays in float32."""
    rows = rows or find_rows(converter, checkpoint)
    prepared = converter.prepare(checkpoint, pre=PRE, file_type=file_type)
    kept = {}
    if file_type != "ALL_F32" and rows.computed:
        exact = converter.prepare(checkpoint, pre=PRE)
        kept = {name: exact.tensors[name] for name in rows.computed if name in exact.tensors}
    write_gguf(converter.gguf, path, prepared, kept)
    return rows


def with_file_weights(
    converter: Converter, checkpoint: Path, file: Path, rows: Rows, directory: Path
) -> tuple[PreTrainedModel, dict[str, str]]:
    """transformers' model with the weights that a GGUF file of it holds, and what the file did not give back (the checkpoint's is used)."""
    restored = restore(converter.gguf, read_gguf(converter.gguf, file), rows, {n: t.spec for n, t in stored_tensors(checkpoint).items()})
    for extra in checkpoint.iterdir():
        (directory / extra.name).write_bytes(extra.read_bytes())
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        given = {
            name: restored.tensors[name].load().to(old.dtype).contiguous() if name in restored.tensors else old
            for name, old in tensors.items()
        }
        save_file(given, shard, metadata={"format": "pt"})
    return loaded(directory), restored.missing


def loaded(directory: Path) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()  # type: ignore[no-any-return]


ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2}
SIGMOID = {"scoring_func": "sigmoid"}  # real configurations say it, transformers' classes take it for granted, and the converter asks
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_CASES = [
    Case("mixtral"),
    Case(
        "qwen2_moe",
        {"tie_word_embeddings": False, "use_sliding_window": False},
        "llama.cpp wants a head of its own, and ignores the sliding window",
    ),
    Case("qwen3_moe", {"mlp_only_layers": []}, "the converter has no names for dense layers in between"),
    Case(
        "qwen3_next",
        {**ALTERNATING, "mlp_only_layers": []},
        "attention in every n-th layer; the converter has no names for dense layers in between",
    ),
    Case(
        "olmoe",
        {"num_key_value_heads": 4, "clip_qkv": None},
        "llama.cpp wants as many heads for keys as for queries, and the converter ignores clip_qkv",
    ),
    Case(
        "deepseek_v2",
        {"q_lora_rank": 32, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        "with group_limited_greedy some tokens go to other experts; llama.cpp wants q_lora_rank in a model of this many layers",
    ),
    Case("deepseek_v3", SIGMOID),
    Case(
        "gpt_oss",
        {"swiglu_limit": 7.0, **PLAIN_ROPE},
        "llama.cpp has a limit of 7 built in; with this model's yarn logits differ by 1e-3",
    ),
    Case("glm4_moe", SIGMOID),
    Case("granitemoe"),
    Case("granitemoeshared"),
    Case("minimax_m2", SIGMOID),
    Case("lfm2_moe", {"routed_scaling_factor": 1.0}, "the converter ignores routed_scaling_factor"),
    Case("jamba", sentencepiece=True),
    Case("cohere2_moe"),
    Case("hy_v3"),
    Case("exaone_moe", SIGMOID),
    Case(
        "dots1",
        {"num_key_value_heads": 4, **SIGMOID, "sliding_window": None, "layer_types": ["full_attention"] * 2},
        "llama.cpp wants as many heads for keys as for queries, and ignores sliding windows",
    ),
    Case(
        "llama4_text",
        {"attention_chunk_size": 128, "attn_temperature_tuning": False},
        "llama.cpp has chunks of 8192 tokens and a temperature from 8192 on built in",
    ),
    Case("glm4_moe_lite", {**SIGMOID, "first_k_dense_replace": 1}),
    Case(
        "phimoe",
        why="llama.cpp renormalises a softmax's two largest instead of sparsemixer's scores",
        sentencepiece=True,
        architectures="PhiMoEForCausalLM",
        fails=True,
        large=False,
    ),
    Case(
        "ernie4_5_moe",
        {"intermediate_size": 1024, "use_bias": False},
        "the converter takes intermediate_size // num_key_value_heads for the width of the shared experts; llama.cpp has no biases here",
        sentencepiece=True,
    ),
    Case(
        "qwen3_5_moe_text", {**ALTERNATING, **SECTIONS}, "attention in every n-th layer, positions in sections as real configurations have"
    ),
    Case(
        "afmoe",
        {
            "score_func": "sigmoid",
            "route_norm": True,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        "real configurations say route_norm, which transformers' class takes for granted and the converter asks; "
        "llama.cpp has three sliding layers in front of each full one built in",
    ),
    Case(
        "hunyuan_v1_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "its converter reads the tokenizer's ranks from the checkpoint's own Python code, which moebit does not run",
        large=False,
        architectures="HunYuanMoEV1ForCausalLM",
        published={"moe_intermediate_size": [32] * 2, "moe_topk": [2] * 2, "num_shared_expert": [1] * 2},
        fails=True,
    ),
    Case("bailing_hybrid", why="llama.cpp knows earlier and later Bailing models, which transformers does not have", fails=True),
]
CASES = {case.model_type: case for case in _CASES}
