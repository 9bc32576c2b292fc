"""Files that are not moebit's own: never deleted, never written to, never read by way of a document or a link."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import moebit
from moebit.errors import BadInputError, MoebitError
from moebit.formats.carried import carried_files
from moebit.formats.ownership import foreign_to_output, foreign_to_partial
from tests.support.models import ARCHITECTURES, Checkpoints
from tests.support.outputs import file_bytes, small_recipe

RTN, MIXTRAL = small_recipe("rtn"), ARCHITECTURES["mixtral"]


@pytest.fixture(scope="module")
def made(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    moebit.quantize(checkpoints.path(MIXTRAL), out, recipe=RTN)
    return out


@pytest.fixture
def model(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints.path(MIXTRAL), tmp_path / "model"))


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def run(model: Path, out: Path, **options: Any) -> Any:
    return moebit.quantize(model, out, recipe=RTN, **options)


def stop(what: str, done: int, total: int) -> None:
    if what == "layers" and done == 1:
        raise KeyboardInterrupt


def interrupted(model: Path, out: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(model, out, progress=stop)
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("kind", ["checkpoint", "sealed and more", "a directory more", "seal edited", "link", "file", "no seal"])
def test_overwrite_deletes_only_what_the_seal_names(kind: str, model: Path, output: Path, tmp_path: Path) -> None:
    if kind == "checkpoint":
        shutil.rmtree(output)
        shutil.copytree(model, output)
        (output / "model.safetensors").rename(output / "model-00001-of-00001.safetensors")
    elif kind == "sealed and more":
        (output / "notes.txt").write_text("six weeks of training")
    elif kind == "a directory more":
        (output / "logs").mkdir()
    elif kind == "seal edited":
        (output / "moebit.json").write_text((output / "moebit.json").read_text().replace('"files": {', '"files": {"notes.txt": "0",'))
        (output / "notes.txt").write_text("six weeks of training")
    elif kind == "link":
        output.rename(tmp_path / "elsewhere")
        output.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        shutil.rmtree(output)
        output.write_text("mine")
    else:
        (output / "moebit.json").unlink()
    before = file_bytes(tmp_path)
    with pytest.raises(BadInputError, match=r"no output of moebit and would be deleted"):
        run(model, output, overwrite=True)
    assert file_bytes(tmp_path) == before


def test_what_moebit_wrote_is_overwritten(model: Path, output: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "fresh")
    run(model, tmp_path / "fresh", overwrite=True)
    (output / "report.html").unlink()  # no part of the seal
    run(model, output, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "model", "out"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("kind", ["files", "an output"])
def test_a_directory_that_is_called_replaced(kind: str, overwrite: bool, model: Path, made: Path, tmp_path: Path) -> None:
    """A user's copy of an output may have this name; it is in the way only where something is put there."""
    out, replaced = tmp_path / "out", tmp_path / "out.replaced"
    if kind == "files":
        replaced.mkdir()
        (replaced / "notes.txt").write_text("mine")
    else:
        shutil.copytree(made, replaced)
    before = file_bytes(replaced)
    run(model, out)
    assert file_bytes(replaced) == before
    if overwrite:
        with pytest.raises(BadInputError, match=r"out\.replaced is in the way"):
            run(model, out, overwrite=True)
    assert file_bytes(replaced) == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize("kind", ["a note", "a directory", "no journal", "another journal"])
def test_a_partial_that_holds_other_files(kind: str, option: str, model: Path, tmp_path: Path) -> None:
    partial = interrupted(model, tmp_path / "out")
    if kind == "a note":
        (partial / "notes.txt").write_text("mine")
    elif kind == "a directory":
        (partial / "profile").mkdir()
        (partial / "profile" / "photo.jpg").write_text("mine")
    elif kind == "no journal":
        (partial / "journal.jsonl").unlink()
    else:
        (partial / "journal.jsonl").write_text('{"started": {"moebit": "1"}}\n')
    before = file_bytes(tmp_path)
    with pytest.raises(BadInputError):
        run(model, tmp_path / "out", **{option: True})
    assert file_bytes(tmp_path) == before


def test_a_linked_partial_is_not_followed(model: Path, tmp_path: Path) -> None:
    elsewhere = interrupted(model, tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "out.partial").symlink_to(elsewhere)
    before = file_bytes(elsewhere)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BadInputError, match="is a link"):
            run(model, tmp_path / "out", **options)
    assert file_bytes(elsewhere) == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_running_job_is_left_alone(option: str, model: Path, tmp_path: Path) -> None:
    partial = interrupted(model, tmp_path / "out")
    before = file_bytes(partial)
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(BadInputError, match="another run is writing there"):
            run(model, tmp_path / "out", **{option: True})
    finally:
        os.close(held)
    assert file_bytes(partial) == before


def test_a_partial_that_is_exchanged_does_not_become_the_output(model: Path, made: Path, tmp_path: Path) -> None:
    """The directory that gets the name is the one that was locked."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def exchange(what: str, done: int, total: int) -> None:
        if what == "layers" and done == total:
            partial.rename(tmp_path / "first")
            shutil.copytree(tmp_path / "first", partial)

    with pytest.raises(MoebitError):
        run(model, out, progress=exchange)
    assert not out.exists()


# --- the checkpoint's files


@pytest.mark.parametrize(
    "name", ["overlay.json", "moebit.json", "report.json", "report.txt", "stream-00001.json", "calibration.jsonl.txt", "profile.json"]
)
def test_files_with_a_meaning_are_not_carried(name: str, model: Path) -> None:
    (model / name).write_text('{"before": {"../../x": "y"}}')
    (model / "vocab.json").write_text("{}")
    assert [file.name for file in carried_files(model) if file.name in (name, "vocab.json")] == ["vocab.json"]


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("{}")
    (model / name).symlink_to(secret)
    with pytest.raises(BadInputError, match=f"{name}: is a link to .*--follow-links"):
        run(model, tmp_path / "out")
    with pytest.raises(BadInputError, match="is a link"):
        moebit.inspect(model)
    assert not (tmp_path / "out").exists()
    run(model, tmp_path / "out", follow_links=True)
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_links_inside_the_folder_and_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (snapshot / "vocab.json").write_text("{}")
    (snapshot / "added.json").symlink_to("vocab.json")
    run(snapshot, tmp_path / "out")
    assert moebit.verify(tmp_path / "out")["findings"] == []
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", "a\nb", "x" * 300])
def test_an_index_names_files_of_its_folder(name: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))
    with pytest.raises(BadInputError, match="plain name"):
        moebit.inspect(model)


def test_what_is_moebits_own(made: Path, model: Path, tmp_path: Path) -> None:
    assert foreign_to_output(made) is None
    assert foreign_to_output(model) == "it has no intact moebit.json"
    assert foreign_to_partial(interrupted(model, tmp_path / "out")) is None
    assert foreign_to_partial(made) == "it has no intact journal.jsonl"
