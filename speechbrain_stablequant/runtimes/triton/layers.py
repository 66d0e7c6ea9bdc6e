"""Layers of an encoder on the operators of ``kernels``.

Activations are [batch, time, channels] in one of the two ``forms``. ``dtype``
is that of float activations everywhere.
"""

import torch
from torch.nn import functional as F

from ...core.encoder_spec import AnyLayer, Norm
from ...core.integer_layer import FloatLayer, IntegerLayer
from .forms import OPS, Form, convert, input_form, move_norm, normalize
from .kernels import conv as conv_kernel
from .kernels import group_conv, matmul, wave, wave_gram


def _scale(layer: IntegerLayer, device: torch.device) -> torch.Tensor:
    scale = layer.activation_scale.float().reshape(1).to(device)
    return (scale * layer.weight_scale.float().to(device)).contiguous()


def _bias(layer: AnyLayer, device: torch.device) -> torch.Tensor | None:
    bias = layer.full_bias()
    return None if bias is None else bias.to(device).contiguous()


class Linear:
    """Linear layers with the same input, computed as one product.

    All are integer with equal input forms, or all are float.
    """

    def __init__(
        self,
        layers: tuple[AnyLayer, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.form = input_form(layers[0], dtype)
        self.dtype = dtype
        weights = [layer.weight.to(device) for layer in layers]
        self.weight = torch.cat(weights).contiguous()
        biases = [_bias(layer, device) for layer in layers]
        self.bias = None
        if any(bias is not None for bias in biases):
            filled = [
                weight.new_zeros(len(weight), dtype=torch.float32)
                if bias is None
                else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self.bias = torch.cat(filled).contiguous()
        if self.form.quantized:
            scales = [_scale(layer, device) for layer in layers]
            self.scale = torch.cat(scales).contiguous()
        else:
            self.weight = self.weight.to(dtype)
            self.bias = None if self.bias is None else self.bias.to(dtype)

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

    def __init__(
        self,
        layers: tuple[AnyLayer, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        forms = [input_form(layer, dtype) for layer in layers]
        if all(form == forms[0] for form in forms):
            self.parts = [Linear(layers, dtype, device)]
            self.form = forms[0]
        else:
            self.parts = [Linear((layer,), dtype, device) for layer in layers]
            self.form = Form(dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, time, in] in ``self.form`` to 16 bit [batch, time, 3 out]."""
        if len(self.parts) == 1:
            return self.parts[0](x)
        return torch.cat(
            [part(convert(x, part.form)) for part in self.parts], dim=-1
        )


def masked_group_norm(
    x: torch.Tensor, norm: Norm, frames: torch.Tensor
) -> torch.Tensor:
    """GroupNorm of each channel over the first ``frames`` (int64 scalar) frames
    of [batch, time, channels], to float32; the others hold anything finite."""
    x = x.float()
    real = (torch.arange(x.shape[1], device=x.device) < frames)[None, :, None]
    mean = (x * real).sum(1, keepdim=True) / frames
    centered = x - mean
    variance = (centered.square() * real).sum(1, keepdim=True) / frames
    return centered * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


class FloatConv:
    """A convolution in floating point, by torch."""

    def __init__(
        self, layer: FloatLayer, dtype: torch.dtype, device: torch.device
    ):
        self.form = Form(dtype)
        self.layer = layer
        self.weight = layer.weight.to(device, dtype)
        self.bias = None if layer.bias is None else layer.bias.to(device, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """16 bit [batch, time, in] to [batch, frames, out]."""
        layer = self.layer
        y = F.conv1d(
            x.transpose(1, 2), self.weight, self.bias,
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip
        return y.transpose(1, 2).contiguous()


def check_plain_conv(layer: IntegerLayer) -> None:
    """Raises unless a convolution has no padding, dilation or groups."""
    if (layer.padding, layer.dilation, layer.groups) != (0, 1, 1):
        raise ValueError(
            f"{layer.name}: the triton runtime has no kernel for a strided "
            f"convolution with padding {layer.padding}, dilation "
            f"{layer.dilation}, groups {layer.groups}; use backend: torch"
        )


def _takes_wave(layer: FloatLayer) -> bool:
    """Whether ``wave_conv`` can compute a convolution."""
    _, channels, taps = layer.weight.shape
    plain = (layer.padding, layer.dilation, layer.groups) == (0, 1, 1)
    return plain and channels == 1 and taps <= wave.MAX_TAPS


class ConvStage:
    """Stage of the feature extractor: convolution, norm, GELU, to ``form``."""

    def __init__(
        self,
        conv: AnyLayer,
        norm: Norm | None,
        form: Form,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.form = input_form(conv, dtype)
        self.out = form
        self.dtype = dtype
        self.norm = move_norm(norm, device)
        self.kernel, self.stride = conv.weight.shape[-1], conv.stride
        self.over_time = self.norm is not None and self.norm.over_time
        self.fused = self.norm is None or (
            not self.over_time
            and conv.weight.shape[0] <= matmul.MAX_NORM_CHANNELS
        )
        self.float_conv = None
        if isinstance(conv, FloatLayer):
            if not _takes_wave(conv):
                self.float_conv = FloatConv(conv, dtype, device)
                return
            # audio needs more than bfloat16's 8 bits of mantissa
            narrow = torch.float32 if dtype == torch.float32 else torch.float16
            self.weight = conv.weight[:, 0].to(device, narrow).contiguous()
            self.scale = torch.ones(len(self.weight), device=device)
        else:
            check_plain_conv(conv)
            self.weight = conv_kernel.pack_weight(conv.weight).to(device)
            self.scale = _scale(conv, device)
        self.bias = _bias(conv, device)

    def _norm_arguments(self) -> tuple:
        if self.norm is None or not self.fused:
            return None, None, 0.0
        return self.norm.weight, self.norm.bias, self.norm.eps

    def _finish(
        self, y: torch.Tensor, frames: torch.Tensor | None
    ) -> torch.Tensor:
        """Norm, GELU and conversion where they are not fused."""
        if self.over_time:
            y = masked_group_norm(y, self.norm, frames)
            return convert(y, self.out, gelu=True)
        return normalize(self.norm, y, self.out, gelu=True)

    def _wave(
        self, wave: torch.Tensor, frames: torch.Tensor | None
    ) -> torch.Tensor:
        quantized = (self.form.inverse, self.form.limit)
        scale, bias = self.scale, self.bias
        if self.over_time:
            scale, bias = self._over_time(wave, frames)
        elif not self.fused:
            y = OPS.wave_conv(
                wave, *quantized, self.weight, scale, bias, self.stride,
                None, None, 0.0, False, self.dtype,
            )  # fmt: skip
            return self._finish(y, frames)
        return OPS.wave_conv(
            wave, *quantized, self.weight, scale, bias, self.stride,
            *self._norm_arguments(), True, *self.out.arguments(),
        )  # fmt: skip

    def _over_time(
        self, wave: torch.Tensor, frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of each utterance that include the norm."""
        gram = OPS.wave_gram(
            wave, self.form.inverse, self.form.limit, self.weight.dtype,
            self.kernel, self.stride, frames,
        )  # fmt: skip
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        return wave_gram.normalized_over_time(
            gram, frames, self.weight, self.scale, *norm
        )

    def __call__(
        self, x: torch.Tensor, frames: torch.Tensor | None
    ) -> torch.Tensor:
        """[batch, time, in] in ``self.form``, or float32 [batch, samples] for
        the first stage, to [batch, frames, out] in ``self.out``. ``frames``
        (int64 scalar, real output frames) is read by a norm over time only."""
        if self.float_conv is not None:
            x = x[:, :, None].to(self.dtype) if x.dim() == 2 else x
            return self._finish(self.float_conv(x), frames)
        if x.dim() == 2:
            return self._wave(x, frames)
        form = self.out if self.fused else Form(self.dtype)
        y = OPS.conv1d(
            x, self.weight, self.scale, self.bias, self.kernel, self.stride,
            *self._norm_arguments(), self.fused, *form.arguments(),
        )  # fmt: skip
        return y if self.fused else self._finish(y, frames)


class PositionalConv:
    """``x + gelu(conv(x))`` without the last ``trim`` frames of ``conv(x)``."""

    def __init__(
        self,
        conv: AnyLayer,
        trim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.form = input_form(conv, dtype)
        self.trim, self.dtype = trim, dtype
        self.padding = conv.padding
        self.float_conv = None
        if isinstance(conv, FloatLayer):
            self.float_conv = FloatConv(conv, dtype, device)
            return
        if (conv.stride, conv.dilation) != (1, 1):
            raise ValueError(
                f"{conv.name}: the triton runtime has no kernel for a "
                f"positional convolution with stride {conv.stride}, dilation "
                f"{conv.dilation}; use backend: torch"
            )
        packed = group_conv.pack_weight(conv.weight, conv.groups)
        self.weight = packed.to(device)
        self.scale, self.bias = _scale(conv, device), _bias(conv, device)

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
        self.device = device
        packed = layer.weight
        if layer.kind != "linear":
            packed = conv_kernel.pack_weight(packed)
        self.weight = packed.contiguous().to(device)
        self.scale, self.bias = _scale(layer, device), _bias(layer, device)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] of a Linear, [batch, in, time] of a convolution."""
        if x.device != self.device:
            self._place(x.device)
        if self.layer.kind == "linear":
            q = convert(x.contiguous(), self.form)
            return OPS.linear(
                q, self.weight, self.scale, self.bias, None, False,
                torch.float32,
            )  # fmt: skip
        q = convert(x.transpose(1, 2).contiguous(), self.form)
        y = OPS.conv1d(
            q, self.weight, self.scale, self.bias, self.layer.weight.shape[-1],
            self.layer.stride, None, None, 0.0, False, torch.float32,
        )  # fmt: skip
        return y.transpose(1, 2)
