"""Several ranks do one job: the output has the bytes of one rank, and a rank that dies ends the run so that it can be resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moebit.quantize.statistics import _strips_of
from moebit.ranks import ALONE, Ranks, Sums
from moebit.tensor.linalg import moment_strips
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import token_file
from tests.support.ranked import ROOT, RankServer

pytestmark = pytest.mark.timeout(1200)  # on a machine that does much else
SAMPLES, LENGTH = 6, 24
SETTINGS = {"calibration.samples": SAMPLES, "calibration.seq_len": LENGTH, "weights.group_size": 32}
# So little memory that a window is a batch, an expert a chunk, and that activations go to files.
MEMORY = "1MiB"
REFINED = {"refine.kind": "straight_through", "refine.steps": 3, "refine.rate": 0.02}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    made = RankServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("texts")
    files = {name: token_file(directory / f"{name}.jsonl", 3 * SAMPLES * LENGTH, seed=seed) for seed, name in enumerate(("a", "b"))}
    return [part for name, file in files.items() for part in ("--text", f"{name}={file}")]


def command(model: Path, out: Path, texts: list[str], preset: str, memory: str = MEMORY, **further: object) -> list[object]:
    settings = [part for key, value in {**SETTINGS, **further}.items() for part in ("--set", f"{key}={value}")]
    return ["quantize", model, "-o", out, "--recipe", preset, *texts, "--memory", memory, "--accept-unquantized", *settings]


def weights(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


def made(server: RankServer, size: int, arguments: list[object], out: Path) -> dict[str, bytes]:
    codes, messages = server.run(size, arguments)
    assert codes == [0] * size, "\n".join(messages)
    found = weights(out)
    assert found
    return found


def test_one_rank_alone_hands_back_what_it_is_given() -> None:
    mine = {"x": torch.arange(3)}
    assert ALONE.everyone(mine)[0] is mine
    assert ALONE.told(["a"]) == [["a"]]
    assert ALONE.agreed(5) == 5
    sums = Sums(torch.zeros(2, 2))
    sums.add(torch.tensor([1, 1]), torch.ones(2, 2))
    sums.settle()
    assert sums.total.tolist() == [[0, 0], [2, 2]]


def test_pieces_are_shared_out_in_their_order() -> None:
    done: list[tuple[int, str]] = []
    taken: list[str] = []

    def work(number: int, piece: str) -> dict[str, torch.Tensor]:
        done.append((number, piece))
        return {piece: torch.zeros(1)}

    ALONE.share_out(["a", "b", "c", "d"], work, lambda piece, found: taken.append(piece + "".join(found)), done=1, stop=3)
    assert done == [(1, "b"), (2, "c")]
    assert taken == ["bb", "cc"]


@pytest.mark.parametrize("size", [1, 64, 600, 2048, 7168])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_strips_of_a_second_moment_are_shared_out(size: int, ranks: int) -> None:
    shares = [_strips_of(rank, size, ranks) for rank in range(ranks)]
    assert sorted(strip for share in shares for strip in share) == moment_strips(size)
    if size == 7168 and ranks <= 4:
        work = [sum((high - low) * (size - low) for low, high in share) for share in shares]
        assert max(work) < 1.35 * sum(work) / ranks


def test_the_leader_is_the_first() -> None:
    assert [Ranks(rank, 2).leads for rank in range(2)] == [True, False]


def test_two_ranks_give_the_bytes_of_one(server: RankServer, checkpoints: Checkpoints, tmp_path: Path, texts: list[str]) -> None:
    model = checkpoints.path(ARCHITECTURES["olmoe"])
    found = [made(server, size, command(model, out := tmp_path / str(size), texts, "gptq-w4"), out) for size in (1, 2)]
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gptq-w4", "best-w3", "eaquant-w3a4", "moqa-3bit", "moequant-w3", "awq-w3"])
@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_presets_give_the_same_bytes_from_any_number_of_ranks(
    name: str, preset: str, server: RankServer, checkpoints: Checkpoints, tmp_path: Path, texts: list[str]
) -> None:
    model, further = checkpoints.path(ARCHITECTURES[name]), {"allocation.target_bits": 4.5} if preset.startswith("moqa") else {}
    found = [made(server, size, command(model, out := tmp_path / str(size), texts, preset, **further), out) for size in (1, 2, 4)]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_learned_rounding_and_sampling_give_the_same_bytes(
    server: RankServer, checkpoints: Checkpoints, tmp_path: Path, texts: list[str]
) -> None:
    model = checkpoints.path(ARCHITECTURES["olmoe"])
    for name, text, memory, further in (("refined", texts, MEMORY, REFINED), ("sampled", [], "4GiB", {})):
        found = []
        for size in (1, 2):
            out = tmp_path / f"{name}-{size}"
            found.append(made(server, size, command(model, out, text, "best-w3", memory, **further), out))
        assert found[0] == found[1], name


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_ends_the_run_which_goes_on_with_another_number(
    killed: int, server: RankServer, checkpoints: Checkpoints, tmp_path: Path, texts: list[str]
) -> None:
    model, whole, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "whole", tmp_path / "out"
    wanted = made(server, 1, command(model, whole, texts, "gptq-w4"), whole)
    codes, messages = server.run(2, command(model, out, texts, "gptq-w4"), killed=killed, at=40)
    assert codes[killed] == -9
    assert codes[1 - killed] == 3
    assert "has lost another rank" in messages[1 - killed]
    assert "--resume" in messages[1 - killed]
    assert not out.exists()
    for size in (1, 2):
        again = tmp_path / f"again-{size}"
        shutil.copytree(out.with_name("out.partial"), again.with_name(f"{again.name}.partial"))
        assert made(server, size, [*command(model, again, texts, "gptq-w4"), "--resume"], again) == wanted


@pytest.mark.slow
def test_torchrun_starts_the_ranks(server: RankServer, checkpoints: Checkpoints, tmp_path: Path, texts: list[str]) -> None:
    model, alone, out = checkpoints.path(ARCHITECTURES["olmoe"]), tmp_path / "alone", tmp_path / "out"
    wanted = made(server, 1, command(model, alone, texts, "gptq-w4"), alone)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "moebit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*run, *map(str, command(model, out, texts, "gptq-w4"))], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert weights(out) == wanted
    assert ended.stdout.count("smaller") == 1  # only one rank tells
