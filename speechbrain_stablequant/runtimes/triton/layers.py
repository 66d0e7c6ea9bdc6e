"""Layers of an encoder on the operators of ``kernels``.

Activations are [batch, time, channels] in one of the two ``forms``.
"""

import torch
from torch.nn import functional as F

from ...core.encoder_spec import AnyLayer, ConvSpec
from ...core.integer_layer import FloatLayer, IntegerLayer
from .forms import OPS, Form, Place, convert, input_form, move_norm, normalize
from .kernels.group_conv import pack_weight as pack_groups
from .kernels.matmul import MAX_NORM_CHANNELS, pack_conv_weight
from .kernels.wave_conv import MAX_TAPS, normalized_over_time


def _scale(layers: tuple[AnyLayer, ...], device: torch.device) -> torch.Tensor:
    """Input scale times weight scale of each output channel."""
    pairs = ((x.activation_scale.reshape(1), x.weight_scale) for x in layers)
    scales = ((a.float().to(device), b.float().to(device)) for a, b in pairs)
    return torch.cat([a * b for a, b in scales])


def _bias(
    layers: tuple[AnyLayer, ...], device: torch.device
) -> torch.Tensor | None:
    """Bias of each output channel; None if no layer has one."""
    biases = [layer.full_bias() for layer in layers]
    if all(bias is None for bias in biases):
        return None
    pairs = zip(layers, biases, strict=True)
    filled = (torch.zeros(len(x.weight)) if b is None else b for x, b in pairs)
    return torch.cat([bias.to(device) for bias in filled])


class Linear:
    """Linear layers with the same input, computed as one product.

    All are integer with equal input forms, or all are float.
    """

    def __init__(self, layers: tuple[AnyLayer, ...], place: Place):
        device, self.dtype = place
        self.form = input_form(layers[0], self.dtype)
        self.weight = torch.cat([layer.weight.to(device) for layer in layers])
        self.bias = _bias(layers, device)
        if self.form.quantized:
            self.scale = _scale(layers, device)
        else:
            self.weight = self.weight.to(self.dtype)
            self.bias = None if self.bias is None else self.bias.to(self.dtype)

    def __call__(
        self,
        x: torch.Tensor,
        form: Form | None = None,
        gelu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[..., in] in ``self.form`` to [..., out] in ``form`` (None: 16 bit):
        GELU if asked, then plus ``residual``."""
        form = form or Form(self.dtype)
        if self.form.quantized:
            return OPS.linear(
                x, self.weight, self.scale, self.bias, residual, gelu,
                *form.arguments(),
            )  # fmt: skip
        y = F.linear(x, self.weight, self.bias)
        if residual is not None:
            y = (F.gelu(y) if gelu else y) + residual
            return convert(y, form)
        return convert(y, form, gelu)


class Projections:
    """Query, key and value, as one product if their input forms are equal."""

    def __init__(self, layers: tuple[AnyLayer, ...], place: Place):
        forms = {input_form(layer, place.dtype) for layer in layers}
        joined = [layers] if len(forms) == 1 else [(x,) for x in layers]
        self.parts = [Linear(part, place) for part in joined]
        self.form = forms.pop() if len(forms) == 1 else Form(place.dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, time, in] in ``self.form`` to 16 bit [batch, time, 3 out]."""
        if len(self.parts) == 1:
            return self.parts[0](x)
        return torch.cat([y(convert(x, y.form)) for y in self.parts], dim=-1)


class FloatConv:
    """A convolution in floating point, by torch."""

    def __init__(self, layer: FloatLayer, place: Place):
        self.layer = layer
        self.weight = layer.weight.to(*place)
        self.bias = None if layer.bias is None else layer.bias.to(*place)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """16 bit [batch, time, in] to [batch, frames, out]."""
        layer = self.layer
        y = F.conv1d(
            x.transpose(1, 2), self.weight, self.bias,
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip
        return y.transpose(1, 2).contiguous()


def check_plain_conv(layer: AnyLayer) -> None:
    """Raises unless a convolution has no padding, dilation or groups."""
    if (layer.padding, layer.dilation, layer.groups) != (0, 1, 1):
        raise ValueError(
            f"{layer.name}: the triton runtime has no kernel for a strided "
            f"convolution with padding {layer.padding}, dilation "
            f"{layer.dilation}, groups {layer.groups}; use backend: torch"
        )


def _check_first(conv: AnyLayer) -> None:
    """Raises unless ``wave_conv`` can compute the first convolution."""
    check_plain_conv(conv)
    taps = conv.weight.shape[-1]
    if taps > MAX_TAPS:
        raise ValueError(
            f"{conv.name}: the triton runtime has no kernel for a first "
            f"convolution of more than {MAX_TAPS} taps, this one has {taps}; "
            "use backend: torch"
        )
    if isinstance(conv, IntegerLayer) and conv.zero_point():
        raise ValueError(
            f"{conv.name}: the triton runtime has no kernel for a waveform "
            "with a zero point; use backend: torch"
        )


class ConvStage:
    """Stage of the feature extractor: convolution, norm, GELU, to ``out``."""

    def __init__(
        self, stage: ConvSpec, is_first: bool, out: Form, place: Place
    ):
        conv, norm = stage.conv, stage.norm
        device, dtype = place
        self.form, self.out, self.dtype = input_form(conv, dtype), out, dtype
        self.norm = move_norm(norm, device)
        self.over_time = norm is not None and norm.over_time
        self.is_first = is_first
        channels, _, self.kernel = conv.weight.shape
        self.stride = conv.stride
        # whether the convolution's kernel also computes norm and GELU
        self.fused = (
            norm is None or self.over_time or channels <= MAX_NORM_CHANNELS
        )
        self.float_conv = None
        if is_first:
            _check_first(conv)
        elif self.over_time:
            raise ValueError(
                f"{conv.name}: the triton runtime has a kernel for GroupNorm "
                "after the first convolution only; use backend: torch"
            )
        if isinstance(conv, IntegerLayer):
            check_plain_conv(conv)
            self.weight = pack_conv_weight(conv.weight).to(device)
            self.scale = _scale((conv,), device)
        elif is_first:
            # audio needs more than bfloat16's 8 bits of mantissa
            narrow = torch.float32 if dtype == torch.float32 else torch.float16
            self.weight = conv.weight[:, 0].to(device, narrow).contiguous()
            self.scale = torch.ones(channels, device=device)
        else:
            self.float_conv = FloatConv(conv, place)
            return
        self.bias = _bias((conv,), device)

    def _over_time(
        self, wave: torch.Tensor, samples: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of each utterance that include the norm."""
        frames = (samples - self.kernel) // self.stride + 1
        gram = OPS.wave_gram(
            wave, self.form.inverse, self.form.limit, self.weight.dtype,
            self.kernel, self.stride, frames,
        )  # fmt: skip
        return normalized_over_time(
            gram, frames, self.weight, self.scale,
            self.norm.weight, self.norm.bias, self.norm.eps,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """[batch, time, in] in ``self.form``, or float32 [batch, samples] for
        the first stage, to [batch, frames, out] in ``self.out``. ``samples``
        (int64 scalar) are the real ones, which a norm over time is taken of."""
        if self.float_conv is not None:
            y = self.float_conv(x)
            return normalize(self.norm, y, self.out, gelu=True)
        scale, bias, norm = self.scale, self.bias, (None, None, 0.0)
        if self.over_time:
            scale, bias = self._over_time(x, samples)
        elif self.norm is not None and self.fused:
            norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        form = self.out if self.fused else Form(self.dtype)
        end = (*norm, self.fused, *form.arguments())
        if self.is_first:
            y = OPS.wave_conv(
                x, self.form.inverse, self.form.limit, self.weight,
                scale, bias, self.stride, *end,
            )  # fmt: skip
        else:
            y = OPS.conv1d(
                x, self.weight, scale, bias, self.kernel, self.stride, *end
            )
        return y if self.fused else normalize(self.norm, y, self.out, gelu=True)


class PositionalConv:
    """``x + gelu(conv(x))`` without the last ``trim`` frames of ``conv(x)``."""

    def __init__(self, conv: AnyLayer, trim: int, place: Place):
        device, self.dtype = place
        self.form = input_form(conv, self.dtype)
        self.trim = trim
        self.padding = conv.padding
        self.float_conv = None
        if isinstance(conv, FloatLayer):
            self.float_conv = FloatConv(conv, place)
            return
        if (conv.stride, conv.dilation) != (1, 1):
            raise ValueError(
                f"{conv.name}: the triton runtime has no kernel for a "
                f"positional convolution with stride {conv.stride}, dilation "
                f"{conv.dilation}; use backend: torch"
            )
        self.weight = pack_groups(conv.weight, conv.groups).to(device)
        self.scale, self.bias = _scale((conv,), device), _bias((conv,), device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """16 bit [batch, time, channels] to the same."""
        if self.float_conv is not None:
            y = self.float_conv(x)
            return x + F.gelu(y[:, : y.shape[1] - self.trim])
        return OPS.group_conv1d(
            convert(x, self.form), self.weight, self.scale, self.bias, x,
            self.padding, self.trim, True, self.dtype,
        )  # fmt: skip


class Head:
    """A Linear or plain Conv1d outside the encoder, float to float32.

    Takes the float layer's input, and follows it to another device.
    """

    def __init__(self, layer: IntegerLayer, device: torch.device):
        self.layer = layer
        self.form = input_form(layer, torch.float32)
        self._place(device)

    def _place(self, device: torch.device) -> None:
        layer = self.layer
        linear = layer.kind == "linear"
        weight = layer.weight if linear else pack_conv_weight(layer.weight)
        self.packed = (
            weight.contiguous().to(device),
            _scale((layer,), device),
            _bias((layer,), device),
        )

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] of a Linear, [batch, in, time] of a convolution."""
        if x.device != self.packed[0].device:
            self._place(x.device)
        end = (False, torch.float32)
        if self.layer.kind == "linear":
            q = convert(x.contiguous(), self.form)
            return OPS.linear(q, *self.packed, None, *end)
        q = convert(x.transpose(1, 2).contiguous(), self.form)
        window = (self.layer.weight.shape[-1], self.layer.stride)
        y = OPS.conv1d(q, *self.packed, *window, None, None, 0.0, *end)
        return y.transpose(1, 2)
