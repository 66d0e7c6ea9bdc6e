"""The input of a probe: two utterances of generated, speech-like sound."""

import math

import torch
from torch.nn import functional as F

#: Length of each utterance; the second one is padded.
SECONDS = (0.6, 0.36)

# (first, second, third) formant of five vowels in Hz; weights and widths.
_VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)

_FORMANTS = ((1.0, 60.0), (0.6, 90.0), (0.3, 150.0))


def speech_like(samples: int, rate: int, seed: int) -> torch.Tensor:
    """Generated sound with the pitch, formants and syllables of speech,
    int16 [samples]."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    pitch = 130 + 25 * torch.sin(2 * math.pi * 1.7 * time + seed) - 20 * time
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / rate
    place = 5 * time + seed
    vowel = place.floor().long()
    blend = 0.5 - 0.5 * torch.cos(math.pi * (place - vowel))
    table = torch.tensor(_VOWELS, dtype=torch.float64)
    this, following = (table[(vowel + i) % len(table)] for i in (0, 1))
    formants = this + (following - this) * blend[:, None]
    voiced = torch.zeros_like(time)
    for harmonic in range(1, 31):
        frequency = harmonic * pitch
        gain = sum(
            weight / (1 + ((frequency - formants[:, i]) / width) ** 2)
            for i, (weight, width) in enumerate(_FORMANTS)
        )
        audible = frequency < 0.45 * rate
        voiced += gain * torch.sin(harmonic * phase) * audible
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    noise = noise - F.pad(noise, (1, 0))[:-1]
    syllable = torch.sin(math.pi * place).abs()
    breath = 0.35 * (1 - syllable) ** 2 + 0.002
    wave = voiced * syllable + breath * noise
    return (wave / wave.abs().max() * 16384).round().to(torch.int16)


def utterances(rate: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The utterances of a probe, int16 [utterances, samples], and their
    lengths, int64 [utterances]."""
    counts = [round(seconds * rate) for seconds in SECONDS]
    wave = torch.zeros(len(counts), max(counts), dtype=torch.int16)
    for seed, (row, count) in enumerate(zip(wave, counts, strict=True)):
        row[:count] = speech_like(count, rate, seed)
    return wave, torch.tensor(counts)


def float_waves(wave: torch.Tensor) -> torch.Tensor:
    return wave.float() / 32768
