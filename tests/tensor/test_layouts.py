"""Packed layouts of other formats, against loops written from the formats' definitions and against the libraries that are here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from moebit.tensor.layouts import awq, fp4, gptq, mlx, words

EXPERTS, OUT, IN, GROUPS = 3, 32, 64, 2


def codes_of(bits: int, shape: tuple[int, ...] = (EXPERTS, OUT, IN)) -> Tensor:
    """Random codes among which both extremes are."""
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int64)
    codes.flatten()[:2] = torch.tensor([0, 2**bits - 1])
    return codes.to(torch.uint8)


def bits_of(words_N: Tensor) -> list[int]:
    """All bits of a row of 32-bit words, the least significant first."""
    return [int(word) >> i & 1 for word in words_N.to(torch.int64) for i in range(32)]


def stream(words_N: Tensor, bits: int) -> list[int]:
    """The codes of a row, read bit by bit."""
    all_bits = bits_of(words_N)
    return [sum(bit << i for i, bit in enumerate(all_bits[k : k + bits])) for k in range(0, len(all_bits) - bits + 1, bits)]


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits: int, version: int) -> None:
    codes, zeros = codes_of(bits), codes_of(bits, (EXPERTS, OUT, GROUPS)).clamp(min=1)
    qweight, qzeros = gptq.pack_codes(codes, bits), gptq.pack_zeros(zeros, bits, version=version)
    assert (qweight.shape, qweight.dtype) == ((EXPERTS, IN * bits // 32, OUT), torch.int32)
    assert (qzeros.shape, qzeros.dtype) == ((EXPERTS, GROUPS, OUT * bits // 32), torch.int32)
    assert stream(qweight[1, :, 5], bits)[:IN] == codes[1, 5].tolist()
    assert stream(qzeros[2, 1], bits)[:OUT] == (zeros[2, :, 1] - int(version == 1)).tolist()
    assert torch.equal(gptq.unpack_codes(qweight, bits), codes)
    assert torch.equal(gptq.unpack_zeros(qzeros, bits, version=version), zeros.to(torch.int32))


def test_gptq_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="from 1 to 16"):
        gptq.pack_zeros(torch.zeros(OUT, 1, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="do not fill"):
        gptq.pack_codes(torch.zeros(8, 20, dtype=torch.uint8), 3)
    assert gptq.group_index(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert gptq.group_index(3, -1).tolist() == [0, 0, 0]


def test_awq() -> None:
    codes = codes_of(4)
    packed = awq.pack_outputs(codes)
    assert (packed.shape, packed.dtype) == ((EXPERTS, IN, OUT // 8), torch.int32)
    for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        assert int(packed[1, 7, 2].to(torch.int64)) >> 4 * nibble & 15 == int(codes[1, 16 + output, 7])
    assert torch.equal(awq.unpack_outputs(packed), codes)
    with pytest.raises(ValueError, match="do not fill"):
        awq.pack_outputs(codes[:, :12])


@pytest.mark.parametrize("bits", mlx.BITS)
def test_mlx(bits: int) -> None:
    codes = codes_of(bits)
    packed = mlx.pack_codes(codes, bits)
    assert (packed.shape, packed.dtype) == ((EXPERTS, OUT, IN * bits // 32), torch.uint32)
    assert stream(packed[2, 3], bits)[:IN] == codes[2, 3].tolist()
    assert torch.equal(mlx.unpack_codes(packed, bits), codes)


def test_fp4() -> None:
    codes = torch.arange(15, dtype=torch.uint8).repeat(2, 2, 2)
    levels = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    packed = fp4.pack_codes(codes)
    assert packed.shape == (2, 2, 15)
    assert torch.equal(unpack_fp4_from_uint8(packed[1], 2, 30).float(), levels[codes[1].long()])
    assert torch.equal(fp4.unpack_codes(packed), codes)
    assert fp4.unpack_codes(torch.tensor([[0x80]], dtype=torch.uint8)).tolist() == [[7, 7]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("dim", "pack", "unpack"),
    [(1, words.pack_words, words.unpack_words), (0, words.pack_zero_points, words.unpack_zero_points)],
)
def test_words(bits: int, dim: int, pack: Callable[..., Tensor], unpack: Callable[..., Tensor]) -> None:
    codes = codes_of(bits, (EXPERTS, 12, 20))
    packed = pack(codes, bits)
    for mine, one in zip(packed, codes, strict=True):
        assert torch.equal(mine, pack_to_int32((one.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), bits, dim))
    assert torch.equal(unpack(packed, bits, codes.shape[-2 + dim]), codes)
