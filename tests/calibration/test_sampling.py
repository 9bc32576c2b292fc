"""Sampling from real models: against the naive search, with and without a cache, interrupted and not, and through the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moebit
from moebit.calibration.beam import Rules, ancestral, ebss
from moebit.calibration.sample_files import Partial
from moebit.calibration.sampling import describe_text, end_ids, kept_windows
from moebit.calibration.settings import Settings, balancing_temperature
from moebit.errors import BadInputError
from moebit.model.decoder import Decoder
from moebit.model.opening import open_hub_checkpoint
from moebit.model.structure import find_structure
from tests.calibration.naive import naive_ebss
from tests.support.models import ARCHITECTURES, EXPERTS, VOCABULARY, Architecture, Checkpoints, quiet
from tests.support.observer import PowerCut, stopped
from tests.support.outputs import file_bytes, small_recipe, token_file

GIB = 2**30
ROWS, LENGTH = 6, 14  # longer than the tiny models' sliding windows
# Attention of every kind: grouped, sliding windows, MLA, sinks, gated linear, Mamba, Mamba 2, delta rule with MLA, scaled rotary.
CACHES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba", "nemotron_h", "kimi_linear", "hunyuan_v1_moe", "phimoe"]


def decoder_of(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint = open_hub_checkpoint(path, dtype)
    return Decoder(checkpoint, find_structure(checkpoint.model))


# --- the whole search


class Exact:
    """A checkpoint in transformers, in float64, one sequence at a time and without a cache."""

    def __init__(self, architecture: Architecture, path: Path) -> None:
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager").eval()
        self.routers = [
            module for name, module in self.model.named_modules() if name.endswith(f"{architecture.block}.{architecture.router}")
        ]
        self.known: dict[tuple[int, ...], Any] = {}

    @torch.no_grad()
    def __call__(self, tokens: tuple[int, ...]) -> tuple[list[float], list[list[int]]]:
        if tokens not in self.known:
            chosen: list[torch.Tensor] = []
            hooks = [router.register_forward_hook(lambda m, args, out: chosen.append(out[2])) for router in self.routers]
            logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            for hook in hooks:
                hook.remove()
            self.known[tokens] = logits.tolist(), [[int((ids == e).sum()) for e in range(EXPERTS)] for ids in chosen]
        return self.known[tokens]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("scope", "rules"),
    [("sequence", Rules(())), ("set", Rules(tuple(range(40)), (50, 51), 1.12, 2))],
    ids=["the paper's", "ours"],
)
def test_the_search_against_loops(checkpoints: Checkpoints, scope: str, rules: Rules) -> None:
    """Every token of every sequence; a third of the vocabulary ends a text, so that restarts occur."""
    architecture = ARCHITECTURES["mixtral"]
    path = checkpoints.path(architecture)
    restarts = torch.randint(60, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    decoder = decoder_of(path, torch.float64)
    with decoder.loaded():
        found, usage = ebss(decoder, restarts, rules, width=3, temperature=0.3, scope=scope)
    exact = Exact(architecture, path)
    assert found.tolist() == naive_ebss(exact, restarts.tolist(), rules, width=3, tau=0.3, scope=scope)
    for sequence, counts in zip(found.tolist(), usage.tolist(), strict=True):
        assert counts == exact(tuple(sequence[:-1]))[1]
    if rules.ends:
        assert any(token in rules.ends for row in found.tolist() for token in row[:-1])


def test_plain_sampling_against_loops(checkpoints: Checkpoints) -> None:
    architecture = ARCHITECTURES["olmoe"]
    path = checkpoints.path(architecture)
    generator = torch.Generator().manual_seed(4)
    restarts = torch.randint(60, VOCABULARY, (3, 8), generator=generator)
    uniform = torch.rand(3, 8, generator=generator, dtype=torch.float64)
    ends = tuple(range(20))
    decoder = decoder_of(path, torch.float64)
    with decoder.loaded():
        found, usage = ancestral(decoder, restarts, uniform, Rules(ends), temperature=0.1)
    exact = Exact(architecture, path)
    for row in range(3):
        tokens = [int(restarts[row, 0])]
        for t in range(1, 8):
            p = torch.tensor(exact(tuple(tokens))[0], dtype=torch.float64).div(0.1).softmax(0).tolist()
            up_to, token = 0.0, -1
            while up_to <= float(uniform[row, t]):
                token += 1
                up_to += p[token]
            tokens.append(int(restarts[row, t]) if tokens[-1] in ends else token)
        assert found[row].tolist() == tokens
        assert usage[row].tolist() == exact(tuple(tokens[:-1]))[1]


# --- caches


@pytest.mark.parametrize("name", CACHES)
def test_rows_that_change_places_write_what_they_write_without_a_cache(checkpoints: Checkpoints, name: str) -> None:
    architecture = ARCHITECTURES[name]
    reference = checkpoints.reference(architecture)
    generator = torch.Generator().manual_seed(0)
    decoder = decoder_of(checkpoints.path(architecture))
    tokens = torch.randint(1, VOCABULARY, (ROWS, 1), generator=generator)
    with decoder.loaded():
        decoder.start(LENGTH)
        for _ in range(LENGTH - 1):
            logits, routed = decoder.step(tokens[:, -1])
            order = torch.randint(0, ROWS, (ROWS,), generator=generator)
            decoder.reorder(order)
            tokens = torch.cat([tokens[order], torch.randint(1, VOCABULARY, (ROWS, 1), generator=generator)], 1)
        logits, routed = decoder.step(tokens[:, -1])
    with torch.no_grad():
        wanted = reference.model(input_ids=tokens, use_cache=False).logits[:, -1]
    assert len(routed) == sum(architecture.moe)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_cache_that_does_not_follow_is_refused(checkpoints: Checkpoints) -> None:
    """MiniMax's own cache keeps the states of its linear attention where re-ordering does not reach them."""
    decoder = decoder_of(checkpoints.path(ARCHITECTURES["minimax"]))
    ids = torch.arange(1, VOCABULARY)
    with decoder.loaded():
        with pytest.raises(BadInputError, match=r"does not follow when rows change places .*--kind self"):
            decoder.row_bytes(ids, 32, reorder=True)
        assert decoder.row_bytes(ids, 32, reorder=False) > 0


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_follow_are_accepted(checkpoints: Checkpoints, name: str) -> None:
    decoder = decoder_of(checkpoints.path(ARCHITECTURES[name]))
    with decoder.loaded():
        decoder.row_bytes(torch.arange(1, VOCABULARY), 32, reorder=True)


def test_what_a_row_takes(checkpoints: Checkpoints) -> None:
    """Full attention: keys and values of every layer, head and token, at least; and not ten times as much."""
    architecture = ARCHITECTURES["olmoe"]
    config = architecture.make_config()
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    decoder = decoder_of(checkpoints.path(architecture))
    with decoder.loaded():
        short, long = (decoder.row_bytes(torch.arange(1, VOCABULARY), n, reorder=True) for n in (100, 1100))
    assert 1000 * per_token <= long - short <= 2000 * per_token


# --- the verb


def sampled(path: Path, out: Path, **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    result = moebit.sample(path, out, **{"sequences": 6, "length": 16, "memory": GIB, **options})
    return [json.loads(line)["input_ids"] for line in out.read_text().splitlines()], result


@pytest.mark.parametrize("kind", ["ebss", "self", "self-balanced"])
def test_what_is_written(checkpoints: Checkpoints, tmp_path: Path, kind: str) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    rows, result = sampled(path, tmp_path / "a.jsonl", kind=kind)
    assert len(rows) == 6
    assert all(len(row) == 16 and all(0 <= token < VOCABULARY for token in row) for row in rows)
    assert all(row[0] != 0 for row in rows)  # 0 ends a text
    written = json.loads((tmp_path / "a.jsonl.json").read_text())
    assert written == result
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.json"]
    text = describe_text(path, {"a": tmp_path / "a.jsonl"}, sequences=6, length=16)
    for key in ("sigma", "std", "tokens_per_expert", "unseen", "perplexity", "distinct_4grams", "per_layer", "tokens"):
        assert text[key] == result[key], key
    assert result["tokens_per_second"] > 0
    again, _ = sampled(path, tmp_path / "b.jsonl", kind=kind)
    other, _ = sampled(path, tmp_path / "c.jsonl", kind=kind, seed=1)
    assert rows == again != other


@pytest.mark.parametrize(
    ("asked", "extend", "temperature", "penalty", "ngram"),
    [
        ({}, "sampled", None, 1.0, 0),
        ({"scope": "sequence"}, "likeliest", 1.2, 1.12, 4),
        ({"temperature": 1.2}, "likeliest", 1.2, 1.12, 4),
        ({"extend": "likeliest"}, "likeliest", 1.2, 1.12, 4),
        ({"extend": "sampled", "temperature": 0.1, "scope": "sequence", "no_repeat_ngram": 3}, "sampled", 0.1, 1.0, 3),
        ({"kind": "self"}, "likeliest", 1.0, 1.0, 0),
        ({"kind": "self-balanced", "temperature": 0.5}, "likeliest", 0.5, 1.0, 0),
    ],
)
def test_what_is_not_said(asked: dict[str, Any], extend: str, temperature: float | None, penalty: float, ngram: int) -> None:
    """The paper's tau and its scope belong to the paper's search."""
    full = Settings(**asked).complete()
    assert (full.extend, full.temperature, full.repetition_penalty, full.no_repeat_ngram) == (extend, temperature, penalty, ngram)


def test_the_weight_of_balance_follows_the_shape(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """One more token, drawn as the others were, moves sigma by what the temperature takes it to move: simulated with uneven experts."""
    checkpoint = open_hub_checkpoint(checkpoints.path(ARCHITECTURES["olmoe"]), torch.float32)
    structure = find_structure(checkpoint.model)
    layers = [layer.moe for layer in structure.layers if layer.moe]
    experts, top_k, tokens = layers[0].layout.experts, layers[0].top_k, 4000
    popularity = torch.rand(len(layers), experts, generator=torch.Generator().manual_seed(0)) + 0.2
    draws = torch.stack([p.expand(tokens + 2000, -1).multinomial(top_k, generator=torch.Generator().manual_seed(1)) for p in popularity])
    slots = torch.nn.functional.one_hot(draws, experts).sum(2).double()  # [M, T, E]
    before = slots[:, :tokens].sum(1)

    def sigma(counts: torch.Tensor) -> torch.Tensor:
        share = counts / counts.sum(-1, keepdim=True)
        return (experts / (experts - 1) * ((share - 1 / experts) ** 2).sum(-1)).sqrt().mean(0)

    moved = (sigma(before.unsqueeze(1) + slots[:, tokens:]) - sigma(before)).std()
    expected = 40 * balancing_temperature(structure) / tokens
    assert 0.5 < float(moved) / expected < 2
    _, result = sampled(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl", sequences=1)
    assert result["settings"]["temperature"] == balancing_temperature(structure)


def test_balance_is_better_than_chance(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    _, plain = sampled(path, tmp_path / "p.jsonl", kind="self", length=24)
    _, chosen = sampled(path, tmp_path / "c.jsonl", kind="self-balanced", length=24, oversample=5)
    _, beam = sampled(path, tmp_path / "b.jsonl", kind="ebss", length=24, temperature=0.05)
    _, drawn = sampled(path, tmp_path / "d.jsonl", kind="ebss", length=24)
    assert chosen["sigma"] < 0.8 * plain["sigma"]
    assert beam["sigma"] < 0.8 * plain["sigma"]
    assert drawn["sigma"] < 0.8 * plain["sigma"]


class StopError(Exception):
    pass


@pytest.mark.parametrize("options", [{"kind": "ebss", "extend": "sampled"}, {"kind": "self-balanced", "oversample": 2}])
def test_an_interrupted_run_goes_on_to_the_same_bytes(checkpoints: Checkpoints, tmp_path: Path, options: dict[str, Any]) -> None:
    path, options = checkpoints.path(ARCHITECTURES["olmoe"]), {**options, "group": 2}
    sampled(path, tmp_path / "whole.jsonl", **options)

    def stop(what: str, done: int, total: int) -> None:
        if what == "tokens" and done > total // 2:
            raise StopError

    out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
    with pytest.raises(StopError):
        sampled(path, out, progress=stop, **options)
    assert not out.exists()
    lines = partial.read_text().splitlines()
    assert len(lines) > 1
    with pytest.raises(BadInputError, match="--resume"):
        sampled(path, out, **options)
    with pytest.raises(BadInputError, match="another seed"):
        sampled(path, out, resume=True, seed=1, **options)
    partial.write_text("\n".join([*lines[:-1], lines[-1][:-20]]))  # the last group was being written
    seen: list[int] = []
    sampled(path, out, resume=True, progress=lambda what, done, total: seen.append(done) if what == "tokens" else None, **options)
    assert min(seen) >= 2 * 16 * (len(lines) - 2)  # groups that were whole were not written again
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_groups_of_a_set_count_what_was_written_before(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """In groups of one, a sequence knows the others only if the groups before it are handed on."""
    path, options = checkpoints.path(ARCHITECTURES["olmoe"]), {"group": 1, "temperature": 0.05, "sequences": 4, "extend": "likeliest"}
    together, _ = sampled(path, tmp_path / "set.jsonl", scope="set", **options)
    alone, _ = sampled(path, tmp_path / "sequence.jsonl", scope="sequence", **options)
    assert together[0] == alone[0]
    assert together[1:] != alone[1:]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "ebs"}, "--kind ebs"),
        ({"scope": "group"}, "--scope group"),
        ({"extend": "both"}, "--extend both"),
        ({"temperature": 0.0}, "--temperature"),
        ({"length": 4}, "--length 4"),
        ({"length": 4096}, "context of 128"),
        ({"no_repeat_ngram": 1}, "--no-repeat-ngram 1"),
        ({"repetition_penalty": 0.9}, "--repetition-penalty"),
        ({"memory": 2**20}, "whole model in memory"),
    ],
)
def test_what_cannot_be(checkpoints: Checkpoints, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        sampled(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl", **options)


def test_names_of_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    with pytest.raises(BadInputError, match=r"something\.jsonl"):
        sampled(path, tmp_path / "a.txt")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(BadInputError, match="--overwrite"):
        sampled(path, tmp_path / "a.jsonl")


def test_what_begins_and_what_ends(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """The generation settings name what ends a text; none of it, nor any other special token, begins one."""
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    copy = tmp_path / "model"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert end_ids(open_hub_checkpoint(copy)) == [5, 9]
    windows = kept_windows(copy, Settings("self", 200, 8, seed=0).complete(), GIB, tmp_path / "calibration.jsonl", whole=False)
    assert not set(windows[:, 0].tolist()) & {0, 5, 9}
    assert 0 not in windows  # named by the configuration, but no end: never written
    assert len(set(windows[:, 0].tolist())) > 80


# --- in a recipe


def ebss_recipe(**section: Any) -> dict[str, Any]:
    recipe = small_recipe("gptq", samples=5, seq_len=16)
    return recipe | {"calibration": recipe["calibration"] | {"kind": "ebss", **section}}


def test_a_recipe_samples_by_itself(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    moebit.quantize(path, tmp_path / "out", recipe=ebss_recipe(), seed=3)
    rows, _ = sampled(path, tmp_path / "a.jsonl", sequences=5, seed=3, memory=4 * GIB)
    kept = tmp_path / "out" / "calibration.jsonl"
    assert kept.read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert moebit.verify(tmp_path / "out")["state"] == "fine"
    told = json.loads((tmp_path / "out" / "moebit.json").read_text())
    assert "calibration.jsonl" in told["files"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(report["layers"][0]["tokens_per_expert"]) == 5 * 16 * 2
    # the file by itself gives the same weights, and as text for the same recipe, too
    moebit.quantize(path, tmp_path / "text", recipe=ebss_recipe(), text={"a": tmp_path / "a.jsonl"}, seed=3)
    assert not (tmp_path / "text" / "calibration.jsonl").exists()
    for name, content in file_bytes(tmp_path / "out").items():
        if name.endswith(".safetensors"):
            assert content == (tmp_path / "text" / name).read_bytes()
    assert told["calibration"] == json.loads((tmp_path / "text" / "moebit.json").read_text())["calibration"]
    assert len(rows) == 5


def test_a_whole_sample_is_taken_up(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """A run that ended between writing its file and tidying up: nothing is sampled again, and nothing is refused."""
    path, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl"
    with stopped("moebit.tidy", PowerCut()), pytest.raises(PowerCut):
        sampled(path, out)
    before, seen = out.read_bytes(), list[str]()
    sampled(path, out, resume=True, progress=lambda what, done, total: seen.append(what))
    assert "tokens" not in seen
    assert out.read_bytes() == before
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_one_run_at_a_time_writes_a_sample(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl"
    with Partial.begin(tmp_path / "a.jsonl.partial", {"other": 1}):
        before = (tmp_path / "a.jsonl.partial").read_bytes()
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(BadInputError, match=r"a\.jsonl\.partial: another run is writing there"):
                sampled(path, out, **how)
    assert (tmp_path / "a.jsonl.partial").read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize("content", ["mine", "{}", '{"text": "mine"}\n'])
def test_a_file_that_is_no_interrupted_run_is_not_emptied(checkpoints: Checkpoints, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl.partial").write_text(content)
    with pytest.raises(BadInputError, match=r"a\.jsonl\.partial is in the way"):
        sampled(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl", overwrite=True)
    assert (tmp_path / "a.jsonl.partial").read_text() == content


def test_a_link_in_the_place_of_an_interrupted_run_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / "a.jsonl.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(BadInputError, match="cannot write"):
        sampled(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl", overwrite=True)
    assert (tmp_path / "mine").read_text() == ""


def test_the_facts_beside_a_sample_are_not_overwritten(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.json").write_text("mine")
    with pytest.raises(BadInputError, match=r"a\.jsonl\.json exists"):
        sampled(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl.json").read_text() == "mine"


def test_a_sample_is_kept_until_the_journal_names_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, seen = checkpoints.path(ARCHITECTURES["olmoe"]), list[str]()
    with stopped("moebit.record", PowerCut(), lambda partial, kind: kind == "sample"), pytest.raises(PowerCut):
        moebit.quantize(path, tmp_path / "out", recipe=ebss_recipe())
    assert (tmp_path / "out.partial" / "calibration.jsonl").exists()
    assert (tmp_path / "out.partial" / "calibration.jsonl.partial").exists()
    moebit.quantize(path, tmp_path / "out", recipe=ebss_recipe(), resume=True, progress=lambda what, done, total: seen.append(what))
    assert "tokens" not in seen
    assert not (tmp_path / "out" / "calibration.jsonl.partial").exists()


def test_resume_does_not_sample_again(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "out"
    moebit.quantize(path, tmp_path / "whole", recipe=ebss_recipe())

    def stop(what: str, done: int, total: int) -> None:
        if what == "layers" and done == 1:
            raise StopError

    with pytest.raises(StopError):
        moebit.quantize(path, out, recipe=ebss_recipe(), progress=stop)
    assert (tmp_path / "out.partial" / "calibration.jsonl").exists()
    seen: list[str] = []
    moebit.quantize(path, out, recipe=ebss_recipe(), resume=True, progress=lambda what, done, total: seen.append(what))
    assert "tokens" not in seen
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_a_run_that_ends_while_it_samples_is_taken_up(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "out"
    moebit.quantize(path, tmp_path / "whole", recipe=ebss_recipe())

    def stop(what: str, done: int, total: int) -> None:
        if what == "tokens" and done > total // 2:
            raise StopError

    with pytest.raises(StopError):
        moebit.quantize(path, out, recipe=ebss_recipe(), progress=stop)
    assert moebit.verify(out)["state"] == "unfinished"
    moebit.quantize(path, out, recipe=ebss_recipe(), resume=True)
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def test_a_mixture_of_sample_and_text(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = checkpoints.path(ARCHITECTURES["olmoe"])
    text = token_file(tmp_path / "t.jsonl", 200)
    recipe = ebss_recipe(kind="self", text_share=0.4)
    moebit.quantize(path, tmp_path / "out", recipe=recipe, text={"t": text})
    assert len((tmp_path / "out" / "calibration.jsonl").read_text().splitlines()) == 3
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(report["layers"][0]["tokens_per_expert"]) == 5 * 16 * 2
    with pytest.raises(BadInputError, match=r"text_share.*--text"):
        moebit.quantize(path, tmp_path / "other", recipe=recipe)


def test_a_model_that_does_not_fit_is_refused_by_the_plan(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="whole model in memory"):
        moebit.quantize(checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "out", recipe=ebss_recipe(), memory=2**20, dry_run=True)
