"""Train a small Mixture-of-Experts language model with real routing, from any transformers MoE configuration.

    python examples/train_reference.py examples/tiny-olmoe.yaml \
        --corpus runs/corpus --texts reference/text --out reference/tiny-olmoe --work runs/tiny-olmoe

The byte-level BPE tokenizer is trained on the corpus; data order is a function of (seed, step) and the state is
saved every `--save-every` steps, so that a run that was interrupted goes on where it was. Experts are used evenly,
as in large models: by an auxiliary loss (`training.balance_loss`, Switch Transformer, 2101.03961, equation 4) or by
the router's correction bias (`training.bias_rate`, 2408.15664: after each step the bias of an expert with more than
its share of the tokens falls, that of one with less rises). At the end the bits per byte on held-out text of every
domain stand beside a unigram and an xz baseline, with the expert load, in `training.json`.
`examples/reference_texts.py` makes the corpus and the texts.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Where a new document starts inside the files of a domain: the end token goes in between.
DOCUMENT_START = {"wiki": r"(?m)^ (?== [^=].* = $)", "python": r"(?m)^(?=# FILE: )"}


def documents(domain: str, text: str) -> list[str]:
    pattern = DOCUMENT_START.get(domain)
    return [piece for piece in re.split(pattern, text) if piece.strip()] if pattern else [text]


def train_tokenizer(corpus: dict[str, str], vocab_size: int, sample_bytes: int) -> Tokenizer:
    """Byte-level BPE on the first `sample_bytes` characters of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text[i : i + 10_000] for text in corpus.values() for i in range(0, sample_bytes, 10_000)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, domain: str, text: str) -> np.ndarray:
    ids: list[int] = []
    end = tokenizer.token_to_id(END)
    for document in documents(domain, text):
        ids.append(end)
        for start in range(0, len(document), 1_000_000):
            ids.extend(tokenizer.encode(document[start : start + 1_000_000], add_special_tokens=False).ids)
    return np.array(ids, dtype=np.uint16)


def batch_at(step: int, tokens: dict[str, np.ndarray], training: dict[str, Any]) -> torch.Tensor:
    """[batch, length + 1] token ids: a function of (seed, step) alone."""
    rng = np.random.default_rng([training["seed"], step])
    names = list(training["weights"])
    weights = np.array([training["weights"][name] for name in names], dtype=np.float64)
    length = training["length"] + 1
    rows = []
    for name in rng.choice(names, size=training["batch"], p=weights / weights.sum()):
        start = rng.integers(0, len(tokens[name]) - length)
        rows.append(tokens[name][start : start + length].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def learning_rate(step: int, training: dict[str, Any]) -> float:
    steps, warmup = training["steps"], training["warmup"]
    decay = max(1, int(steps * training["decay_share"]))
    return training["learning_rate"] * min(1.0, (step + 1) / warmup, (steps - step) / decay)


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones there."""
    return device != "cpu" or "avx512_bf16" in Path("/proc/cpuinfo").read_text()


class ExpertLoad:
    """How many routed slots each expert got since the last `take`, by the name of its experts module."""

    def __init__(self, model: torch.nn.Module):
        self.counts: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(self._counter(name, int(module.num_experts)))

    def _counter(self, name: str, experts: int) -> Any:
        def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            slots = torch.bincount(args[1].detach().flatten(), minlength=experts)
            self.counts[name] = self.counts[name] + slots if name in self.counts else slots

        return count

    def take(self) -> dict[str, torch.Tensor]:
        """Counts [E] by module, from here on counted anew."""
        counts, self.counts = self.counts, {}
        return counts


@torch.no_grad()
def move_biases(model: torch.nn.Module, load: dict[str, torch.Tensor], rate: float) -> None:
    """Loss-free balancing: the correction bias of every expert moves by `rate` towards an even load."""
    for name, counts in load.items():
        bias = model.get_submodule(name.rpartition(".")[0] + ".gate").e_score_correction_bias
        bias += rate * torch.sign(counts.float().mean() - counts.float())


def make_optimizer(model: torch.nn.Module, training: dict[str, Any]) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training["learning_rate"], betas=(0.9, 0.95), fused=True)


def save_state(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    tensors = {}
    for name, buffer in model.named_buffers():
        tensors[f"buffer.{name}"] = buffer.detach().clone()
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.detach().contiguous()
    save_file(tensors, path.with_suffix(".tmp"), metadata={"step": str(step)})
    path.with_suffix(".tmp").rename(path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")
            }
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def loss_on(model: torch.nn.Module, ids: torch.Tensor, amp: bool, device: str, balanced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(next-token cross entropy in nats, router balance loss or 0) of [B, L + 1] ids."""
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        out = model(input_ids=ids[:, :-1], use_cache=False, **({"output_router_logits": True} if balanced else {}))
    loss = torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return loss, balance_loss(out.router_logits, model.config) if balanced else torch.zeros(())


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: Any) -> torch.Tensor:
    """Switch Transformer's load balancing loss, mean over layers: E * sum_e (share of slots of e) * (mean probability of e)."""
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(config.num_experts_per_tok, -1).indices
        share = torch.nn.functional.one_hot(chosen, probabilities.shape[-1]).float().mean((0, 1))
        losses.append(probabilities.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def held_out(
    model: torch.nn.Module, load: ExpertLoad, tokenizer: Tokenizer, domain: str, text: str, train_counts: np.ndarray, device: str
) -> dict[str, Any]:
    """Bits per byte of the model, of a unigram model of the training tokens and of xz; expert load [layers, E]."""
    ids = torch.from_numpy(encode(tokenizer, domain, text).astype(np.int64))
    window = 256
    ids = ids[: (len(ids) - 1) // window * window + 1]
    nats, _ = 0.0, load.take()
    for start in range(0, len(ids) - 1, window * 16):
        piece = ids[start : start + window * 16 + 1]
        rows = torch.stack([piece[i : i + window + 1] for i in range(0, len(piece) - 1, window)]).to(device)
        out = model(input_ids=rows[:, :-1], use_cache=False)
        nats += float(torch.nn.functional.cross_entropy(out.logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    size = len(tokenizer.decode(ids[1:].tolist(), skip_special_tokens=True).encode())
    unigram = -np.log2(train_counts / train_counts.sum())
    counts = torch.stack(list(load.take().values()))
    return {
        "bytes": size,
        "bits_per_byte": nats / math.log(2) / size,
        "unigram_bits_per_byte": float(unigram[ids[1:].numpy()].sum()) / size,
        "xz_bits_per_byte": 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) / len(text.encode()),
        "expert_load": (counts / counts.sum(1, keepdim=True)).round(decimals=5).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--corpus", type=Path, required=True, help="DOMAIN.txt for every domain in the configuration's weights")
    parser.add_argument("--texts", type=Path, required=True, help="held-out DOMAIN.eval.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="tokens and training state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    settings = yaml.safe_load(args.config.read_text())
    training = settings["training"]
    if args.steps:
        training["steps"] = args.steps
    args.work.mkdir(parents=True, exist_ok=True)

    corpus = {name: (args.corpus / f"{name}.txt").read_text(encoding="utf-8") for name in training["weights"]}
    tokenizer_file = args.work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(corpus, settings["model"]["vocab_size"], settings["tokenizer"]["sample_bytes"]).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens = {}
    for name, text in corpus.items():
        cache = args.work / f"{name}.npy"
        if not cache.exists():
            np.save(cache, encode(tokenizer, name, text))
        tokens[name] = np.load(cache)
        print(f"{name}: {len(tokens[name]):,} tokens, {len(text.encode()) / len(tokens[name]):.2f} bytes per token", flush=True)

    torch.manual_seed(training["seed"])
    model_type = settings["model"].pop("model_type")
    config = AutoConfig.for_model(model_type, **settings["model"])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").float().to(args.device)
    print(f"{model_type}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    load, coefficient, bias_rate = ExpertLoad(model), training.get("balance_loss", 0.0), training.get("bias_rate", 0.0)
    optimizer = make_optimizer(model, training)
    state = args.work / "state.safetensors"
    first = load_state(state, model, optimizer) if state.exists() else 0

    began, loss_sum, log_every = time.time(), 0.0, 50
    for step in range(first, training["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        batch = batch_at(step, tokens, training).to(args.device)
        loss, balance = loss_on(model, batch, has_bfloat16(args.device), args.device, bool(coefficient))
        (loss + coefficient * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts = load.take()
        if bias_rate:
            move_biases(model, counts, bias_rate * min(1.0, 4 * (training["steps"] - step) / training["steps"]))
        loss_sum += float(loss.detach())
        if (step + 1) % log_every == 0:
            rate = (step + 1 - first) * training["batch"] * training["length"] / (time.time() - began)
            busiest = max(float(c.max() / c.float().mean()) for c in counts.values())
            print(
                f"step {step + 1}/{training['steps']} loss {loss_sum / log_every:.4f} balance {float(balance):.3f} "
                f"busiest expert {busiest:.2f} of the mean {rate:.0f} tokens/s",
                flush=True,
            )
            loss_sum = 0.0
        if (step + 1) % args.save_every == 0 or step + 1 == training["steps"]:
            save_state(state, step + 1, model, optimizer)

    model.eval().to(torch.bfloat16)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=config.max_position_embeddings).save_pretrained(
        args.out
    )
    model.float()
    counts = sum(np.bincount(tokens[n][:3_000_000], minlength=config.vocab_size) for n in tokens) + 1.0
    texts = sorted(args.texts.glob("*.eval.txt"))
    results = {
        file.name.split(".")[0]: held_out(
            model, load, tokenizer, file.name.split(".")[0], file.read_text(encoding="utf-8"), counts, args.device
        )
        for file in texts
    }
    record = {"steps": training["steps"], "tokens": training["steps"] * training["batch"] * training["length"], "domains": results}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, row in results.items():
        baselines = f"unigram {row['unigram_bits_per_byte']:.3f}, xz {row['xz_bits_per_byte']:.3f}"
        print(f"{name}: {row['bits_per_byte']:.3f} bits per byte ({baselines})")


if __name__ == "__main__":
    main()
