import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxmerge.checkpoints.stored import StoredTensor
from jaxmerge.checkpoints.stores import ByteCounter, ByteSource, FileSource
from jaxmerge.errors import CheckpointError


class MemorySource(ByteSource):
    """Bytes in memory that remember which ranges were read."""

    label = "memory"

    def __init__(self, content: bytes, gap: int):
        self.content, self.gap, self.size = content, gap, len(content)
        self.ranges: list[tuple[int, int]] = []

    def read_into(self, offset: int, out: np.ndarray) -> None:
        assert offset >= 0 and offset + out.size <= self.size
        self.ranges.append((offset, offset + out.size))
        out[...] = np.frombuffer(self.content, np.uint8)[offset : offset + out.size]

    def ends_at(self, offset: int) -> bool:
        return offset == self.size


def stored(array: np.ndarray, gap: int = 0, offset: int = 3) -> tuple[StoredTensor, MemorySource]:
    source = MemorySource(bytes(offset) + array.tobytes(), gap)
    return StoredTensor(source, "t", array.dtype, array.shape, offset), source


@given(st.data(), st.lists(st.integers(1, 5), max_size=4), st.sampled_from([0, 4, 1000]))
def test_any_box_is_read_and_without_gaps_nothing_else(data, shape, gap):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    tensor, source = stored(array, gap)
    box = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
    np.testing.assert_array_equal(tensor.read(box), array[box])
    if gap == 0:
        assert sum(stop - start for start, stop in source.ranges) == array[box].nbytes
        assert all(a[1] < b[0] for a, b in itertools.pairwise(source.ranges)), "runs that touch are one read"


def test_rows_are_one_read_and_columns_are_one_read_per_row():
    tensor, source = stored(np.arange(60, dtype=np.float32).reshape(5, 3, 4))
    tensor[1:4]
    assert source.ranges == [(3 + 48, 3 + 4 * 48)]
    source.ranges.clear()
    tensor[1:3, :, 1:3]
    assert len(source.ranges) == 6


def test_short_gaps_are_read_through_when_a_request_is_dear():
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    tensor, source = stored(array, gap=40)
    np.testing.assert_array_equal(tensor[:, 3:5], array[:, 3:5])
    assert source.ranges == [(3 + 12, 3 + 4 * 48 + 20)]


@pytest.mark.parametrize("start, n", [(-1, 2), (5, 2), (0, 7)])
def test_a_run_outside_of_the_tensor_never_reads_its_neighbour(start, n):
    tensor, source = stored(np.arange(6, dtype=np.int64))
    with pytest.raises(IndexError, match="memory: t"):
        tensor.read_flat(start, np.empty(n, np.int64))
    with pytest.raises(IndexError, match="int32"):
        tensor.read_flat(0, np.empty(2, np.int32))
    assert not source.ranges


def test_a_flat_run_goes_straight_into_the_callers_memory(tmp_path):
    array = np.arange(100, dtype=np.float64)
    (tmp_path / "raw").write_bytes(array.tobytes())
    counter = ByteCounter()
    tensor = StoredTensor(FileSource(tmp_path / "raw", counter), "t", array.dtype, (10, 10), 0)
    buffer = np.zeros(50)
    tensor.read_flat(17, buffer[5:35])
    np.testing.assert_array_equal(buffer, np.r_[np.zeros(5), array[17:47], np.zeros(15)])
    assert counter.total == 30 * 8


def test_a_file_that_became_shorter_is_noticed(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(80))
    tensor = StoredTensor(FileSource(tmp_path / "raw", ByteCounter()), "t", np.dtype(np.float64), (10,), 0)
    (tmp_path / "raw").write_bytes(bytes(50))
    with pytest.raises(CheckpointError, match=r"raw ends at byte 50.*truncated"):
        tensor[...]
