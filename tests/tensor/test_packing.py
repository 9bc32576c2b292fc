"""The bitstream against Python's big integers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebit.tensor import pack, unpack
from tests.support import reference

ALL_BITS = range(2, 9)


def random_codes(seed: int, rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, size=(rows, columns), dtype=np.uint8))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 64, 333])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_bytes_equal_the_oracle(bits: int, columns: int) -> None:
    codes_RN = random_codes(bits, 5, columns, bits)
    packed = pack(codes_RN, bits)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (5, -(-columns // 8) * bits))
    for row, codes_N in enumerate(codes_RN.tolist()):
        assert bytes(packed[row].tolist()) == reference.pack_row(codes_N, bits)
        assert reference.unpack_row(bytes(packed[row].tolist()), bits, columns) == codes_N
    restored = unpack(packed, bits, columns)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, codes_RN)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.sampled_from(ALL_BITS), rows=st.integers(1, 4), columns=st.integers(1, 70))
def test_round_trip(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    codes = data.draw(st.lists(row, min_size=rows, max_size=rows))
    codes_RN = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes_RN, bits)
    assert [bytes(line) for line in packed.tolist()] == [reference.pack_row(line, bits) for line in codes]
    assert torch.equal(unpack(packed, bits, columns), codes_RN)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_rows_do_not_share_bytes(bits: int) -> None:
    codes_RN = random_codes(9, 4, 13, bits)
    packed = pack(codes_RN, bits)
    assert torch.equal(packed, torch.cat([pack(codes_RN[row : row + 1], bits) for row in range(4)]))
    assert torch.equal(unpack(packed[2:3], bits, 13), codes_RN[2:3])


@pytest.mark.parametrize("columns", [16, 13])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_views(bits: int, columns: int) -> None:
    """Transposed codes pack, sliced bytes unpack; neither result shares memory with its input."""
    stored = random_codes(10, columns, 6, bits)
    codes_RN = stored.T
    packed = pack(codes_RN, bits)
    assert torch.equal(packed, pack(codes_RN.contiguous(), bits))
    assert torch.equal(unpack(packed.repeat(1, 2)[:, : packed.shape[1]], bits, columns), codes_RN)
    plain, before = codes_RN.contiguous(), codes_RN.clone()
    pack(plain, bits).fill_(0)
    assert torch.equal(plain, before)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_extremes(bits: int) -> None:
    full = torch.full((2, 24), 2**bits - 1, dtype=torch.uint8)
    assert (pack(full, bits) == 255).all()
    assert (pack(torch.zeros_like(full), bits) == 0).all()
    assert pack(full[:0], bits).shape == (0, 3 * bits)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8"):
        pack(torch.tensor([[1, 8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="5 bytes"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 3, 8)
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bit width"):
            pack(torch.zeros(1, 8, dtype=torch.uint8), bits)
