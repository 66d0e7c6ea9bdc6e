"""Convolutions of the feature extractor as products with windows."""

from dataclasses import replace

from ...core.encoder_spec import AnyLayer, EncoderSpec


def strides_of(layer: AnyLayer) -> int:
    """Number of strides that a convolution's window spans."""
    return -(-layer.weight.shape[2] // layer.stride)


def first_windows(spec: EncoderSpec, frames: int) -> int:
    """Windows of the first convolution that give ``frames`` frames: later
    convolutions take whole strides."""
    for stage in reversed(spec.convs[1:]):
        frames = (frames + strides_of(stage.conv) - 1) * stage.conv.stride
    return frames


def flat_windows(layer: AnyLayer) -> AnyLayer:
    """A convolution as a product with windows [in, kernel] -> [kernel * in],
    innermost axis last."""
    rows = layer.weight.transpose(1, 2).flatten(1)
    return replace(layer, kind="linear", weight=rows, groups=1)
