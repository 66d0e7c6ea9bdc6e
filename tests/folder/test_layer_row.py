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
