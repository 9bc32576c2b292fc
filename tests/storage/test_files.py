"""Our reader and writer of safetensors files against the safetensors library, and damaged files."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebit.errors import BadInputError
from moebit.storage import files
from moebit.storage.files import INDEX, ShardFile, TensorEntry, TensorSpec, pieces, read_header, read_index, sha256
from moebit.storage.finite import check_piece

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U32": torch.uint32,
    "BOOL": torch.bool,
}
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (3, 0), (0, 3), (4, 3), (1, 5, 1), (5, 2, 3)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (values > 0) if dtype == torch.bool else values.to(dtype) if not dtype.is_floating_point else (values / 8).to(dtype)


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """The one-byte types first and odd sizes throughout, so that an order by name or as given aligns nothing by itself."""
    kinds = sorted(DTYPES, key=lambda kind: DTYPES[kind].itemsize)
    return {f"{kind}/{i}": random_tensor(DTYPES[kind], shape, i) for kind in kinds for i, shape in enumerate(SHAPES)}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and bits (float8 has no `equal`)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )


def test_every_type_is_covered() -> None:
    assert files.DTYPES == DTYPES


def test_reader_equals_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = tensors_of_all_kinds()
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    expected, entries = load_file(path), read_header(path)
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        assert (entry.name, entry.file, entry.shape, entry.dtype) == (name, path, tuple(expected[name].shape), expected[name].dtype)
        assert entry.spec.nbytes == expected[name].nbytes
        assert same(entry.read(), expected[name]), name
        if entry.shape:
            for start in range(entry.shape[0] + 1):
                for stop in range(start, entry.shape[0] + 1):
                    assert same(entry.read(start, stop), expected[name][start:stop]), (name, start, stop)
            assert same(entry.read(entry.shape[0] // 2), expected[name][entry.shape[0] // 2 :])


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6.0)}, path)
    entry = read_header(path)["w"]
    entry.read().zero_()
    assert torch.equal(entry.read(), torch.arange(6.0))


def test_writer_is_read_by_the_library(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", tensors_of_all_kinds()
    with ShardFile(path, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as shard:
        for name in reversed(tensors):
            shard.write(name, tensors[name])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


def test_written_header_follows_the_format(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    specs = {"ä": TensorSpec(torch.int8, (3,)), "b": TensorSpec(torch.float32, (2, 2))}
    with ShardFile(path, specs) as shard:
        shard.write("ä", torch.tensor([1, 2, 3], dtype=torch.int8))
        shard.write("b", torch.eye(2))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {name: (item["dtype"], item["shape"]) for name, item in header.items()} == {"ä": ("I8", [3]), "b": ("F32", [2, 2])}
    spans = sorted(item["data_offsets"] for item in header.values())
    assert [spans[0][0], spans[-1][1]] == [0, len(raw) - 8 - length]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans)), "the format allows no holes"


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    for name in ("a", "b"):
        with ShardFile(tmp_path / name, {key: TensorSpec(t.dtype, tuple(t.shape)) for key, t in tensors.items()}) as shard:
            for key in sorted(tensors, reverse=name == "b"):
                shard.write(key, tensors[key])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_partial_writes(tmp_path: Path, order: list[int]) -> None:
    """Experts arrive in chunks, in any order, as non-contiguous views, with other tensors in between."""
    w = random_tensor(torch.bfloat16, (8, 3, 5))
    spans = [(0, 3), (3, 6), (6, 8)]
    with ShardFile(
        tmp_path / "a",
        {"first": TensorSpec(torch.int32, (5,)), "w": TensorSpec(w.dtype, (8, 3, 5)), "last": TensorSpec(torch.float32, (1,))},
    ) as shard:
        shard.write("last", torch.tensor([4.0]))
        for i in order:
            start, stop = spans[i]
            view = w[start:stop].transpose(1, 2).contiguous().transpose(1, 2)
            shard.write("w", view, skip=start * 3 * 5 * 2)
        shard.write("first", torch.arange(10, dtype=torch.int32)[::2])
    loaded = load_file(tmp_path / "a")
    assert same(loaded["w"], w)
    assert loaded["first"].tolist() == [0, 2, 4, 6, 8]
    assert loaded["last"].tolist() == [4.0]


def test_unfinished_file_has_no_name(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (4,)), "b": TensorSpec(torch.float32, (2,))}
    shard = ShardFile(tmp_path / "x.safetensors", specs)
    shard.write("a", torch.ones(3))
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match=r"x\.safetensors: 2 tensors incomplete, first a"):
        shard.finish()
    assert not (tmp_path / "x.safetensors").exists()
    shard.write("a", torch.ones(1), skip=12)
    shard.write("b", torch.zeros(2))
    shard.finish()
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1.0] * 4


def test_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError), ShardFile(tmp_path / "x", {"a": TensorSpec(torch.float32, (1,))}) as shard:
        shard.write("a", torch.ones(1, dtype=torch.float16))
    assert list(tmp_path.iterdir()) == []


def test_crash_keeps_the_finished_file(tmp_path: Path) -> None:
    """Writing a shard again replaces the old one only when the new one is complete."""
    path = tmp_path / "x"
    spec = {"a": TensorSpec(torch.float32, (1,))}
    with ShardFile(path, spec) as shard:
        shard.write("a", torch.ones(1))
    before = path.read_bytes()
    ShardFile(path, spec).abandon()
    assert path.read_bytes() == before


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "x", {"a": TensorSpec(torch.float32, (4,)), "b": TensorSpec(torch.float32, (4,))})
    with pytest.raises(TypeError, match=r"a: torch\.float16 written where torch\.float32"):
        shard.write("a", torch.ones(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="a: more bytes"):
        shard.write("a", torch.ones(5))
    with pytest.raises(KeyError):
        shard.write("c", torch.ones(1))
    shard.abandon()


def test_writer_refuses_to_run_into_the_next_tensor(tmp_path: Path) -> None:
    shard = ShardFile(tmp_path / "x", {"a": TensorSpec(torch.float32, (4,)), "b": TensorSpec(torch.float32, (4,))})
    with pytest.raises(ValueError, match="a"):
        shard.write("a", torch.ones(2), skip=12)
    shard.abandon()


def test_a_byte_written_twice_is_no_byte_of_another(tmp_path: Path) -> None:
    """As many bytes as announced, but one of them twice: that would leave a hole."""
    shard = ShardFile(tmp_path / "x", {"a": TensorSpec(torch.uint8, (6,))})
    shard.write("a", torch.ones(2, dtype=torch.uint8), skip=2)
    for skip, count in ((2, 2), (0, 3), (3, 3), (1, 4), (3, 1)):
        with pytest.raises(ValueError, match="a: some of the bytes"):
            shard.write("a", torch.ones(count, dtype=torch.uint8), skip=skip)
    with pytest.raises(ValueError, match="incomplete"):
        shard.finish()
    shard.write("a", torch.zeros(2, dtype=torch.uint8))
    shard.write("a", torch.zeros(2, dtype=torch.uint8), skip=4)
    shard.finish()
    assert load_file(tmp_path / "x")["a"].tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_pieces(seed: int, tmp_path: Path) -> None:
    """Random pieces, some of them overlapping, against a list of bytes."""
    random = np.random.default_rng(seed)
    shard, size = ShardFile(tmp_path / "x", {"a": TensorSpec(torch.uint8, (40,))}), 40
    wanted = np.zeros(size, dtype=int)  # 0: not written
    while (wanted == 0).any():
        start = int(random.integers(0, size))
        stop = int(min(size, start + random.integers(0, 9)))
        value = int(random.integers(1, 256))
        piece = torch.full((stop - start,), value, dtype=torch.uint8)
        if (wanted[start:stop] != 0).any():
            with pytest.raises(ValueError, match="a: "):
                shard.write("a", piece, skip=start)
        else:
            shard.write("a", piece, skip=start)
            wanted[start:stop] = value
    shard.finish()
    assert load_file(tmp_path / "x")["a"].tolist() == wanted.tolist()


def test_a_file_that_cannot_be_laid_out_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardFile, position: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardFile, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        ShardFile(tmp_path / "x", {"a": TensorSpec(torch.uint8, (6,))})
    assert list(tmp_path.iterdir()) == []


def test_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 1000)
    path = tmp_path / "x"
    for content in (b"", b"abc", bytes(range(256)) * 17):
        path.write_bytes(content)
        assert sha256(path) == hashlib.sha256(content).hexdigest()


# --- damaged files


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(100.0), "b": torch.ones(2, 3)}, path)
    return path


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("keep", [0, 3, 8, 50, -1, -25])
def test_truncated_file(shard: Path, keep: int) -> None:
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(BadInputError, match=r"model\.safetensors: .*(truncated|shorter).*again"):
        read_header(shard)


def test_file_that_shrinks_while_it_is_read(shard: Path) -> None:
    entry = read_header(shard)["b"]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(BadInputError, match=r"model\.safetensors: .*'b'"):
        entry.read()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


GARBAGE = {
    "html": b"<html>404 Not Found</html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "ones": b"\xff" * 64,
    "not-utf8": with_header(b"\x80\x81{}"),
    "not-json": with_header(b"{not json"),
    "list": with_header([1, 2]),
    "number": with_header({"w": 3}),
    "no-offsets": with_header({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "shape": with_header({"w": {**F32, "shape": "2"}}, bytes(8)),
    "offset": with_header({"w": {**F32, "data_offsets": [8]}}, bytes(8)),
    "negative-shape": with_header({"w": {**F32, "shape": [-2], "data_offsets": [8, 0]}}, bytes(8)),
    "negative-offset": with_header({"w": {**F32, "data_offsets": [-8, 0]}}, bytes(8)),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"model\.safetensors"):
        read_header(path)


def test_header_at_odds_with_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"w": {**F32, "shape": [3]}}, bytes(8)))
    with pytest.raises(BadInputError, match=r"model\.safetensors: tensor 'w' claims 8 bytes"):
        read_header(path)
    save_file({"w": torch.ones(2, dtype=torch.uint16)}, path)
    with pytest.raises(BadInputError, match=r"model\.safetensors: tensor 'w' has type U16"):
        read_header(path)


# --- directories


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_index_of_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.full((4,), 2.0), "stale": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"c": "model-2.safetensors", "a": "model-1.safetensors", "b": "model-1.safetensors"})
    entries = read_index(tmp_path)
    assert {name: entry.read().tolist() for name, entry in entries.items()} == {"a": [1.0] * 2, "b": [0.0] * 3, "c": [2.0] * 4}


def test_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert read_index(tmp_path).keys() == {"a"}
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    assert read_index(tmp_path).keys() == {"b"}, "model.safetensors goes before others"


def test_missing_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(BadInputError, match=r"shard model-2\.safetensors is named in .*index\.json but missing; download"):
        read_index(tmp_path)


def test_index_names_what_no_shard_has(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "z": "model-1.safetensors", "y": "model-1.safetensors"})
    with pytest.raises(BadInputError, match=r"2 tensors are not in the shard that .*index\.json names, first 'y'"):
        read_index(tmp_path)


def test_index_names_another_shard_than_the_one_that_has_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert read_index(tmp_path)["a"].read().tolist() == [1.0, 1.0], "the index decides which copy counts"


@pytest.mark.parametrize("text", ["{truncated", "[]", "{}", '{"weight_map": []}'], ids=["truncated", "list", "empty", "map"])
def test_garbage_index(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(BadInputError, match=r"model\.safetensors\.index\.json"):
        read_index(tmp_path)


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BadInputError, match=r"no safetensors files here"):
        read_index(tmp_path)


def test_shards_without_index(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({f"a{i}": torch.ones(2)}, tmp_path / f"model-{i}.safetensors")
    with pytest.raises(BadInputError, match=r"2 safetensors files but no model\.safetensors\.index\.json; add the index"):
        read_index(tmp_path)


# --- values


def check_finite(entries: Mapping[str, TensorEntry]) -> None:
    for entry in entries.values():
        for begin, piece in pieces(entry):
            check_piece(entry, begin, piece)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_check_finite_finds_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 4096)  # the tensor spans many pieces
    path = tmp_path / "a.safetensors"
    w = torch.randn(40, 30, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[33, 7, 19] = w[36, 0, 0] = bad
    save_file({"fine": torch.ones(1000, 3), "model.w": w, "integers": torch.ones(3, dtype=torch.int64)}, path)
    entries = read_header(path)
    with pytest.raises(BadInputError, match=rf"'model\.w' holds {bad} at \[33, 7, 19\] .*a\.safetensors"):
        check_finite(entries)
    check_finite({"fine": entries["fine"], "integers": entries["integers"]})


def test_check_finite_accepts_what_only_sums_up_to_infinity(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    w = torch.full((4, 8), torch.finfo(torch.float32).max)
    save_file(
        {
            "w": w,
            "half": torch.full((4, 8), 65504.0, dtype=torch.float16),
            "double": torch.full((2,), 1e300, dtype=torch.float64),
            "none": torch.ones(0, 3),
            "flat": torch.ones(3, 0),
        },
        path,
    )
    check_finite(read_header(path))


def test_check_finite_looks_at_scalars(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"scale": torch.tensor(float("nan"))}, path)
    with pytest.raises(BadInputError, match=r"'scale' holds nan"):
        check_finite(read_header(path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu], ids=str)
def test_check_finite_knows_every_8_bit_code(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({str(code): codes[[0, code]].clone() for code in range(1, 256)} | {"scalar": codes[-1].clone()}, path)
    for name, entry in read_header(path).items():
        if name != "scalar" and torch.isfinite(codes[int(name)].float()):
            check_finite({name: entry})
        else:
            with pytest.raises(BadInputError, match=rf"'{name}' holds"):
                check_finite({name: entry})
