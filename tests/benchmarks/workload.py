"""What executors get and give: the run's files, its input, a callable."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from models import (
    NAMES,
    Recognizer,
    load_modules,
    make_wavs,
    save_quantized,
    save_random,
)
from torch import nn

from speechbrain_stablequant.folder.weights_file import WEIGHTS_FILE
from speechbrain_stablequant.utils.precision import full_float32

#: Seconds of audio that ranges are taken from.
CALIBRATION = 5.0


@dataclass(frozen=True)
class Options:
    """The options of a run, see ``harness.parse``."""

    model: str
    seconds: float
    batch: int
    threads: int
    executors: tuple[str, ...]
    rounds: int
    minutes: float | None
    json: str | None
    bits: int
    device: str
    folder: str | None
    peak: bool
    step: str | None


class Workload:
    """The files and the input of a run, below a folder for all runs."""

    def __init__(self, options: Options, folder: Path):
        self.options = options
        self.folder = folder / Path(options.model).name
        self.folder.mkdir(parents=True, exist_ok=True)

    # -- files -------------------------------------------------------------

    @property
    def float_folder(self) -> Path:
        """The float model."""
        if self.options.model in NAMES:
            return self.folder / "float"
        return Path(self.options.model)

    @property
    def integer_folder(self) -> Path:
        """The quantized model."""
        return self.folder / f"int{self.options.bits}"

    def shape_folder(self) -> Path:
        """For what is made for inputs of the run's shape alone."""
        seconds, batch = self.options.seconds, self.options.batch
        folder = self.folder / f"{seconds:g}s-{batch}"
        folder.mkdir(exist_ok=True)
        return folder

    def make(self) -> None:
        """Writes the float and the quantized model, unless they exist."""
        if not self.float_folder.is_dir():
            save_random(self.options.model, self.float_folder)
        if not (self.integer_folder / WEIGHTS_FILE).is_file():
            save_quantized(
                load_modules(self.float_folder),
                self.calibration_wavs(),
                self.options.bits,
                self.integer_folder,
            )

    # -- what is computed --------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """The float modules, on the device, newly read."""
        modules = load_modules(self.float_folder)
        return {k: m.to(self.options.device) for k, m in modules.items()}

    def recognizer(self) -> Recognizer:
        """The float model as one module, newly read."""
        return Recognizer(self.modules()).eval()

    @cached_property
    def shared_recognizer(self) -> Recognizer:
        """The float model, one for all who leave it as it is."""
        return self.recognizer()

    @cached_property
    def wavs(self) -> torch.Tensor:
        """float32 [batch, samples], on the device."""
        wavs = make_wavs(self.options.seconds, self.options.batch)
        return wavs.to(self.options.device)

    def calibration_wavs(self, batch: int = 1) -> torch.Tensor:
        """float32 [batch, samples], on the CPU."""
        return make_wavs(CALIBRATION, batch)

    @cached_property
    def logits(self) -> torch.Tensor | None:
        """Logits of the float model for :attr:`wavs`, on the CPU; None where
        they do not fit onto the device."""
        try:
            with torch.no_grad(), full_float32():
                return self.shared_recognizer(self.wavs).cpu()
        except torch.OutOfMemoryError as error:
            print(f"no reference to compare with: {error}", file=sys.stderr)
            return None


@dataclass(frozen=True)
class Prepared:
    """An executor that is ready."""

    # wavs [batch, samples] to logits [batch, frames, labels]
    run: Callable[[torch.Tensor], torch.Tensor]
    size_mb: float  # what its weights take on disk, in 10^6 bytes


@dataclass(frozen=True)
class Executor:
    """A way to compute the model."""

    # Reads its files and gets ready.
    load: Callable[[Workload], Prepared]
    # Writes these files, in a process of its own.
    make: Callable[[Workload], None] | None = None
    # The last of them that ``make`` writes; if it exists, they all do.
    made: Callable[[Workload], Path] | None = None

    def is_made(self, workload: Workload) -> bool:
        """Whether nothing has to be made."""
        return self.make is None or self.made(workload).exists()


def size_of(paths: Sequence[Path]) -> float:
    """Size of files in 10^6 bytes."""
    return sum(path.stat().st_size for path in paths) / 1e6


def size_of_tensors(tensors: Sequence[torch.Tensor]) -> float:
    """Size of tensors in 10^6 bytes, each storage once."""
    storages = {
        (s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors
    }
    return sum(storages.values()) / 1e6


@dataclass(frozen=True)
class Call:
    """Milliseconds that a call took."""

    ms: float  # by the clock, or on the device
    cpu_ms: float  # of all threads of this process together


def time_once(
    run: Callable[[torch.Tensor], torch.Tensor],
    wavs: torch.Tensor,
) -> Call:
    """Times a call; on a GPU between two events of its stream."""
    begin, cpu = time.perf_counter(), time.process_time()
    if wavs.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run(wavs)
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end)
    else:
        run(wavs)
        ms = (time.perf_counter() - begin) * 1e3
    return Call(ms, (time.process_time() - cpu) * 1e3)
