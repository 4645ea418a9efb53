"""Lazy tensors read what NumPy would index, however they are derived and cut."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmerge as jm
from jaxmerge.trees.lazy import ArrayTensor, StackedTensor, covering_boxes

MANY = settings(max_examples=60)


def numbers(shape, dtype: Any = np.float32):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


@st.composite
def views(draw, depth=3):
    """A lazy tensor derived in some way, and the array that it stands for."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    array = numbers(shape)
    if draw(st.booleans()):  # a source whose memory is not in row-major order
        array = np.asfortranarray(array)
    tensor: jm.LazyTensor = ArrayTensor(array)
    for _ in range(draw(st.integers(0, depth))):
        kind = draw(st.sampled_from(["transpose", "cast", "window", "stack"]))
        if kind == "transpose":
            axes = draw(st.permutations(range(array.ndim)))
            tensor, array = tensor.transpose(*axes), array.transpose(axes) if axes else array
        elif kind == "cast":
            dtype = draw(st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float64]))
            tensor, array = tensor.astype(dtype), array.astype(dtype)
        elif kind == "window":
            index = draw(indices(array.shape))
            tensor, array = tensor.window(*index), array[index]
        elif array.ndim < 5:
            tensor, array = StackedTensor([tensor, tensor.astype(array.dtype)]), np.stack([array, array])
    return tensor, array


@st.composite
def indices(draw, shape):
    index = []
    for n in shape[: draw(st.integers(0, len(shape)))]:
        ends = st.none() | st.integers(-n - 1, n + 1)
        kinds = [st.builds(slice, ends, ends)] + ([st.integers(-n, n - 1)] if n else [])
        index.append(draw(st.one_of(*kinds)))
    if draw(st.booleans()):
        index.insert(draw(st.integers(0, len(index))), ...)
        # indices after an ellipsis count from the last axis
        after = len(index) - index.index(...) - 1
        for i, item in enumerate(index[-after:] if after else []):
            n = shape[len(shape) - after + i]
            if isinstance(item, int) and not -n <= item < n:
                index[len(index) - after + i] = slice(None)
    return tuple(index)


def assert_equal(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


@MANY
@given(view=views(), data=st.data())
def test_any_view_reads_like_its_array(view, data):
    tensor, array = view
    assert (tensor.shape, tensor.dtype, tensor.size, tensor.ndim) == (array.shape, array.dtype, array.size, array.ndim)
    assert tensor.nbytes == array.nbytes
    assert_equal(np.asarray(tensor), array)
    index = data.draw(indices(array.shape))
    assert_equal(np.asarray(tensor[index]), np.asarray(array[index]))


@MANY
@given(view=views(), data=st.data())
def test_any_view_reads_flat_runs(view, data):
    tensor, array = view
    start = data.draw(st.integers(0, array.size))
    stop = data.draw(st.integers(start, array.size))
    out = np.empty(stop - start, array.dtype)
    tensor.read_flat(start, out)
    assert_equal(out, array.reshape(-1)[start:stop])


def test_a_slice_of_nothing_reads_nothing():
    ArrayTensor(np.zeros((0, 3), np.float32)).window(slice(0, 0)).read_flat(0, np.empty(0, np.float32))


@MANY
@given(shape=st.lists(st.integers(0, 4), max_size=4).map(tuple), data=st.data())
def test_covering_boxes_cover_exactly_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    array, seen = numbers(shape), []
    for box, at in covering_boxes(shape, start, stop):
        entries = array[box].reshape(-1)
        assert entries[0] == at
        seen.extend(entries)
    assert seen == list(range(start, stop))


def test_what_is_read_is_new_memory():
    array = numbers((3, 4))
    tensor = ArrayTensor(array)
    for view in (tensor, tensor.T, tensor.astype(np.float16), tensor.window(slice(1, 3)), StackedTensor([tensor])):
        before = np.asarray(view).copy()
        np.asarray(view)[...] = -1
        assert_equal(np.asarray(view), before)


class Recorder(jm.LazyTensor):
    """Remembers the boxes that are read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.label = array, array.shape, array.dtype, "model.safetensors: w"
        self.boxes = []

    def read(self, box):
        self.boxes.append(tuple((piece.start, piece.stop) for piece in box))
        return self.array[box].copy()


def test_only_the_slice_is_read():
    source = Recorder(numbers((6, 8)))
    derived = source.T.astype(np.float16).window(slice(2, 6))
    assert source.boxes == []
    derived[1, 3]
    assert source.boxes == [((3, 4), (3, 4))]
    source.boxes.clear()
    StackedTensor([source, source])[1, 2:4]
    assert source.boxes == [((2, 4), (0, 8))]


def test_flat_runs_are_read_in_few_boxes():
    source = Recorder(numbers((100, 8)))
    source.read_flat(3, np.empty(790, np.float32))
    assert source.boxes == [((0, 1), (3, 8)), ((1, 99), (0, 8)), ((99, 100), (0, 1))]


def test_casting_to_its_own_dtype_is_the_tensor_itself():
    tensor = ArrayTensor(numbers((2,)))
    assert tensor.astype("float32") is tensor


@pytest.mark.parametrize("index", [3, -4, (0, 0, 0), (..., ...), slice(None, None, 2)], ids=str)
def test_what_cannot_be_indexed(index):
    with pytest.raises(IndexError, match="weights"):
        ArrayTensor(numbers((3, 4)), "weights")[index]


def test_what_cannot_be_derived():
    tensor = ArrayTensor(numbers((3, 4)), "weights")
    with pytest.raises(jm.ShapeError, match="no permutation"):
        tensor.transpose(0, 0)
    with pytest.raises(jm.ShapeError, match="at least one"):
        StackedTensor([])
    with pytest.raises(jm.ShapeError, match="shapes differ"):
        StackedTensor([tensor, tensor.T])
    with pytest.raises(jm.DTypeError, match="cast"):
        StackedTensor([tensor, tensor.astype(np.float16)])
    with pytest.raises(ValueError, match="without reading"):
        np.array(tensor, copy=False)


def test_prints_shape_dtype_and_origin():
    text = repr(ArrayTensor(numbers((3, 4), ml_dtypes.bfloat16), "model.safetensors: w"))
    assert text == "ArrayTensor(bfloat16[3, 4], model.safetensors: w)"
