"""The waveform as input of the first convolution; see ``wave_conv``."""

import torch

from .conv import frames_out

#: Largest kernel size of the first convolution.
MAX_TAPS = 128


def check_wave(name: str, wave: torch.Tensor, taps: int, stride: int) -> int:
    """Number of output frames; raises for an input that has no kernel."""
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
    """The waveform as input for weights of ``dtype``: integers, or a cast."""
    if dtype == torch.int8:
        return torch.round(wave * inverse).clamp_(-limit, limit)
    return wave.to(dtype)
