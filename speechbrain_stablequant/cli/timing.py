"""Times a folder by the runtimes of this machine."""

import statistics
import time
from pathlib import Path

import torch

from ..transcribe.load import ModulesRecognizer, Recognizer, load
from ..utils.typed import one_line
from .plans import columns

_CPU = ("openvino", "torch_int8", "onnx")


def table(folder: Path, seconds: float, rounds: int, trust: bool) -> str:
    """Times of a pass over generated audio; the runtimes take turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("triton",) if device == "cuda" else _CPU
    made: dict[str, Recognizer | ModulesRecognizer] = {}
    absent: list[str] = []
    chosen = load(folder, device=device, trust_source=trust)
    samples = round(seconds * chosen.sample_rate)
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1, samples, generator=generator)
    chosen.transcribe_batch(wave)
    for name in names:
        try:
            found = load(folder, name, device, trust_source=trust)
            found.transcribe_batch(wave)
            made[name] = found
        # A library may raise anything on a machine that it does not know.
        except Exception as error:
            absent.append(f"{name}: {one_line(error, 200)}")
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, recognizer in made.items():
            start = time.perf_counter()
            recognizer.transcribe_batch(wave)
            times[name].append(time.perf_counter() - start)
    if not times:
        return "\n".join(["no integer runtime computes it here", *absent])
    medians = {name: statistics.median(row) for name, row in times.items()}
    return "\n".join([*_lines(medians, chosen.runtime, seconds), *absent])


def _lines(
    medians: dict[str, float], chosen: str | None, seconds: float
) -> list[str]:
    """The table, and whether the fastest one is what is chosen."""
    fastest = min(medians, key=medians.get)
    rows = [["runtime", "ms", "real-time factor", "of the fastest"]]
    for name, spent in sorted(medians.items(), key=lambda row: row[1]):
        ratio = spent / medians[fastest]
        rows.append(
            [
                name,
                f"{spent * 1e3:.1f}",
                f"{spent / seconds:.4f}",
                f"{ratio:.2f}",
            ]
        )
    threads = torch.get_num_threads()
    lines = [f"{seconds:g} s of audio, {threads} threads", columns(rows)]
    if chosen == fastest:
        lines.append(f"backend: auto takes {chosen}, the fastest here")
    else:
        lines.append(
            f"backend: auto takes {chosen}; {fastest} is faster here: load the "
            f"folder with backend={fastest}"
        )
    return lines
