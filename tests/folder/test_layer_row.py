"""Descriptions of layers that cannot be."""

from dataclasses import replace

import pytest

from speechbrain_stablequant.folder.layer_row import LayerRow, _check_row

ROW = LayerRow("linear", 8, 8, [4, 8], bias=False)


@pytest.mark.parametrize("shape", [[], [4], [4, 8, 1], [0, 8]])
@pytest.mark.parametrize("group", [0, 4])
def test_shape(shape, group):
    _check_row("a", replace(ROW, weight_group=group))
    with pytest.raises(ValueError, match="layer 'a': shape cannot be"):
        _check_row("a", replace(ROW, shape=shape, weight_group=group))
