"""Descriptions of layers that cannot be."""

from dataclasses import replace

import pytest

from speechbrain_stablequant.folder.layer_row import LayerRow, _check_row

ROW = LayerRow("linear", 8, 8, [4, 8], bias=False)


@pytest.mark.parametrize("shape", [[], [4], [4, 8, 1], [0, 8]])
def test_shape(shape):
    _check_row(ROW)
    with pytest.raises(ValueError, match="shape cannot be"):
        _check_row(replace(ROW, shape=shape))


@pytest.mark.parametrize(
    ("key", "value"),
    [("stride", 1), ("stride", (1,)), ("padding", (0, -1)), ("dilation", ())],
)
def test_pairs_of_a_plane(key, value):
    pair = {"stride": (1, 2), "padding": (0, 1), "dilation": (1, 1)}
    row = LayerRow("conv2d", 8, 8, [4, 2, 3, 3], False, **pair)
    _check_row(row)
    with pytest.raises(ValueError, match=f"{key} cannot be"):
        _check_row(replace(row, **{key: value}))
    with pytest.raises(ValueError, match="stride cannot be"):
        _check_row(replace(row, kind="conv1d", shape=[4, 2, 3]))
