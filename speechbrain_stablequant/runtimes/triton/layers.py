"""Layers of an encoder on the operators of ``kernels``.

Activations travel in one of two *forms*: integers on a layer's scale, or
16-bit floats. A layer says which form it wants its input in and is told which
form its output is wanted in, so that quantizing is part of what comes before.
Everything is [batch, time, channels].
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...core.affine import qmax
from ...core.integer_layer import FloatLayer, IntegerLayer
from ...model.encoder_spec import AnyLayer, Norm
from .kernels import group_conv, matmul, wave, wave_gram

OPS = torch.ops.stablequant


@dataclass(frozen=True)
class Form:
    """How an activation is represented.

    Arguments
    ---------
    dtype : torch.dtype
        int8 for integers.
    inverse : float
        1 / scale of the integers.
    limit : int
        The largest integer.
    zero : int
        The integer that 0 becomes.
    """

    dtype: torch.dtype
    inverse: float = 1.0
    limit: int = 127
    zero: int = 0

    @property
    def quantized(self) -> bool:
        """Whether it is integers."""
        return self.dtype == torch.int8

    def arguments(self) -> tuple[torch.dtype, float, int, int]:
        """What the operators take."""
        return self.dtype, self.inverse, self.limit, self.zero


def input_form(layer: AnyLayer, dtype: torch.dtype) -> Form:
    """The form that a layer wants its input in.

    Arguments
    ---------
    layer : IntegerLayer or FloatLayer
        The layer.
    dtype : torch.dtype
        Of floating-point activations.

    Returns
    -------
    Form
    """
    if isinstance(layer, FloatLayer):
        return Form(dtype)
    # in float32, as numerics.quantize takes it
    inverse = 1.0 / layer.activation_scale.float().reshape(())
    limit = qmax(layer.activation_bits)
    return Form(torch.int8, float(inverse), limit, layer.zero_point())


def convert(x: torch.Tensor, form: Form, gelu: bool = False) -> torch.Tensor:
    """A float activation, after a GELU if asked, in another form."""
    if form.quantized:
        return OPS.quantize(x, form.inverse, form.limit, gelu, form.zero)
    return (F.gelu(x) if gelu else x).to(form.dtype)


def normalize(
    norm: Norm | None, x: torch.Tensor, form: Form, gelu: bool = False
) -> torch.Tensor:
    """LayerNorm, if there is one, and GELU, if asked, to a form."""
    if norm is None:
        return convert(x, form, gelu)
    return OPS.layer_norm(
        x, norm.weight, norm.bias, norm.eps, gelu, *form.arguments()
    )


def move_norm(norm: Norm | None, device: torch.device) -> Norm | None:
    """A normalization with its parameters on a device, as float32."""
    if norm is None:
        return None
    weight, bias = (
        p.to(device, torch.float32).contiguous()
        for p in (norm.weight, norm.bias)
    )
    return Norm(weight, bias, norm.eps, norm.over_time)


def _scale(layer: IntegerLayer, device: torch.device) -> torch.Tensor:
    scale = layer.activation_scale.float().reshape(1).to(device)
    return (scale * layer.weight_scale.float().to(device)).contiguous()


def _bias(layer: AnyLayer, device: torch.device) -> torch.Tensor | None:
    bias = layer.full_bias()
    return None if bias is None else bias.to(device).contiguous()


class Linear:
    """One product for one or more linear layers that share their input.

    Arguments
    ---------
    layers : sequence
        Linear layers: all integer with equal input forms, or all float. Their
        outputs stand side by side.
    dtype : torch.dtype
        Of floating-point activations.
    device : torch.device
        Where it runs.
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
        """[..., in] in the layer's form to [..., out] in ``form`` (16 bit if
        it is None): GELU if asked, then plus ``residual``."""
        form = form or Form(self.dtype)
        if self.form.quantized:
            return OPS.linear(
                x,
                self.weight,
                self.scale,
                self.bias,
                residual,
                gelu,
                *form.arguments(),
            )
        y = F.linear(x, self.weight, self.bias)
        if residual is not None:
            y = (F.gelu(y) if gelu else y) + residual
            return convert(y, form)
        return convert(y, form, gelu)


class Projections:
    """Query, key and value: one product where their inputs agree.

    Arguments
    ---------
    layers : sequence
        The three linear layers.
    dtype : torch.dtype
        Of floating-point activations.
    device : torch.device
        Where it runs.
    """

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
    """Each channel normalized over its real frames, in float32.

    Arguments
    ---------
    x : torch.Tensor
        [batch, time, channels].
    norm : Norm
        Its parameters.
    frames : torch.Tensor
        int64 scalar: only so many frames are real.

    Returns
    -------
    torch.Tensor
        float32; what is not real holds anything finite.
    """
    x = x.float()
    real = (torch.arange(x.shape[1], device=x.device) < frames)[None, :, None]
    mean = (x * real).sum(1, keepdim=True) / frames
    centered = x - mean
    variance = (centered.square() * real).sum(1, keepdim=True) / frames
    return centered * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


class FloatConv:
    """A convolution that stays in floating point."""

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
            x.transpose(1, 2),
            self.weight,
            self.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
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
    """Whether the kernel for the waveform computes a convolution."""
    _, channels, taps = layer.weight.shape
    plain = (layer.padding, layer.dilation, layer.groups) == (0, 1, 1)
    return plain and channels == 1 and taps <= wave.MAX_TAPS


class ConvStage:
    """Convolution, normalization, GELU: one stage of the feature extractor.

    Arguments
    ---------
    conv : IntegerLayer or FloatLayer
        The convolution, without padding.
    norm : Norm or None
        What follows it.
    form : Form
        In which the output is wanted.
    dtype : torch.dtype
        Of floating-point activations.
    device : torch.device
        Where it runs.
    """

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
            # audio has more than the 8 bits of a bfloat16's mantissa
            narrow = torch.float32 if dtype == torch.float32 else torch.float16
            self.weight = conv.weight[:, 0].to(device, narrow).contiguous()
            self.scale = torch.ones(len(self.weight), device=device)
        else:
            check_plain_conv(conv)
            self.weight = matmul.pack_conv_weight(conv.weight).to(device)
            self.scale = _scale(conv, device)
        self.bias = _bias(conv, device)

    def _norm_arguments(self) -> tuple:
        if self.norm is None or not self.fused:
            return None, None, 0.0
        return self.norm.weight, self.norm.bias, self.norm.eps

    def _finish(
        self, y: torch.Tensor, frames: torch.Tensor | None
    ) -> torch.Tensor:
        """What could not be fused."""
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
            wave,
            *quantized,
            self.weight,
            scale,
            bias,
            self.stride,
            *self._norm_arguments(),
            True,
            *self.out.arguments(),
        )

    def _over_time(
        self, wave: torch.Tensor, frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias that stand for the norm, by utterance."""
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
        """One stage.

        Arguments
        ---------
        x : torch.Tensor
            [batch, time, in] in the stage's form; float32 [batch, samples]
            if it is the first.
        frames : torch.Tensor or None
            int64 scalar: real frames of the output; read by a norm over time.

        Returns
        -------
        torch.Tensor
            [batch, frames, out] in the form that was asked for.
        """
        if self.float_conv is not None:
            x = x[:, :, None].to(self.dtype) if x.dim() == 2 else x
            return self._finish(self.float_conv(x), frames)
        if x.dim() == 2:
            return self._wave(x, frames)
        form = self.out if self.fused else Form(self.dtype)
        y = OPS.conv1d(
            x,
            self.weight,
            self.scale,
            self.bias,
            self.kernel,
            self.stride,
            *self._norm_arguments(),
            self.fused,
            *form.arguments(),
        )
        return y if self.fused else self._finish(y, frames)


class PositionalConv:
    """``x + gelu(conv(x))``, trimmed to the frames of ``x``.

    Arguments
    ---------
    conv : IntegerLayer or FloatLayer
        The grouped convolution.
    trim : int
        Last frames that are not wanted.
    dtype : torch.dtype
        Of floating-point activations.
    device : torch.device
        Where it runs.
    """

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
        packed = group_conv.pack_group_weight(conv.weight, conv.groups)
        self.weight = packed.to(device)
        self.scale, self.bias = _scale(conv, device), _bias(conv, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """16 bit [batch, time, channels] to the same."""
        if self.float_conv is not None:
            y = self.float_conv(x)
            return x + F.gelu(y[:, : y.shape[1] - self.trim])
        return OPS.group_conv1d(
            convert(x, self.form),
            self.weight,
            self.scale,
            self.bias,
            x,
            self.padding,
            self.trim,
            True,
            self.dtype,
        )


class Head:
    """A layer outside the encoder: float input as the float layer takes it,
    float32 output.

    Arguments
    ---------
    layer : IntegerLayer
        A Linear, or a Conv1d without padding, dilation or groups.
    device : torch.device
        Where it runs first; it follows its input to another.
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
            packed = matmul.pack_conv_weight(packed)
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
