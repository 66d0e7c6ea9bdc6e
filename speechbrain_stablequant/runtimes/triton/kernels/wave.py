"""The waveform as the first convolution takes it; see ``wave_conv``."""

import torch

from .matmul import frames_out

#: Most taps of the first convolution.
MAX_TAPS = 128


def check_wave(name: str, wave: torch.Tensor, taps: int, stride: int) -> int:
    """Frames that a convolution makes of a waveform.

    Arguments
    ---------
    name : str
        The operator, for errors.
    wave : torch.Tensor
        float32 [batch, samples], contiguous.
    taps, stride : int
        Of the convolution.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        The waveform cannot be read, or the convolution has no kernel.
    """
    if taps > MAX_TAPS:
        raise ValueError(
            f"stablequant::{name}: a kernel of {taps} taps, at most "
            f"{MAX_TAPS} are supported"
        )
    if wave.dtype != torch.float32 or not wave.is_contiguous():
        raise ValueError(
            f"stablequant::{name}: wave must be contiguous float32, got "
            f"{wave.dtype} with strides {list(wave.stride())}"
        )
    frames = frames_out(wave.shape[1], taps, stride)
    if frames == 0:
        raise ValueError(
            f"stablequant::{name}: {wave.shape[1]} samples are fewer than "
            f"the kernel's {taps}"
        )
    return frames


def as_input(
    wave: torch.Tensor, inverse: float, limit: int, dtype: torch.dtype
) -> torch.Tensor:
    """The waveform as a convolution with weights of ``dtype`` takes it."""
    if dtype == torch.int8:
        return torch.round(wave * inverse).clamp_(-limit, limit)
    return wave.to(dtype)
