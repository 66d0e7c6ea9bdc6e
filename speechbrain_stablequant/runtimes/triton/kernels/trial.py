"""Checks once per card that the kernels compute what they should.

A kernel miscompiled for a card gives wrong words and no error. So before the
first use of a card, every operator is compared with its plain-torch reference,
with the default tile. A card that passed is remembered until the kernels, the
driver, Triton or torch change. The tiles of a checkpoint's own layers are tried
where they are chosen, see ``tuning``.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import triton

from ....utils.files import code_identity, identity
from ....utils.store import Store
from . import group_conv, matmul
from .library import OPERATORS
from .plain import HALF_TOLERANCE, difference

logger = logging.getLogger(__name__)

OPS = torch.ops.stablequant
_DRIVER = Path("/proc/driver/nvidia/version")


def trials() -> Iterator[tuple[str, tuple, float]]:
    """Operator, arguments (tensors on CPU) and tolerance of each test call."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    def int8(*shape: int) -> torch.Tensor:
        options = {"generator": generator, "device": "cpu"}
        return torch.randint(-127, 128, shape, **options).to(torch.int8)

    exact, half = 1e-5, HALF_TOLERANCE
    rounded = (torch.int8, 20.0, 127, -100)
    x, q = normal(2, 70, 128), int8(2, 70, 128)
    vector = normal(128).abs()
    norm = (vector, normal(128), 1e-5)
    scale = vector * 1e-4
    yield "quantize", (x, 20.0, 31, True, -28), exact
    yield "layer_norm", (x.half(), *norm, True, *rounded), exact
    yield "layer_norm_both", (x, *norm, torch.float16, 20.0, 127), exact
    square = int8(128, 128)
    bias = normal(128)
    yield "linear", (q, square, scale, bias, None, True, *rounded), exact
    residual = (q, square, scale, bias, x.half(), False, torch.float16)
    yield "linear", residual, exact
    kernel = matmul.pack_conv_weight(int8(128, 128, 3))
    end = (True, *rounded)
    yield "conv1d", (q, kernel, scale, None, 3, 2, *norm, *end), exact
    plain = (None, None, 0.0)
    yield "conv1d", (q, kernel, scale, bias, 3, 2, *plain, *end), exact
    grouped = group_conv.pack_weight(int8(128, 32, 16), 4)
    end = (x.half(), 8, 1, True, torch.float16)
    yield "group_conv1d", (q, grouped, scale, bias, *end), exact
    wave = (normal(2, 700), 40.0, 127, int8(128, 10))
    end = (True, *rounded)
    yield "wave_conv", (*wave, scale, bias, 5, *norm, *end), exact
    own = (torch.stack([scale, 2 * scale]), torch.stack([bias, -bias]))
    yield "wave_conv", (*wave, *own, 5, *plain, *end), exact
    frames = torch.tensor(120)
    window = (10, 5, frames)
    yield "wave_gram", (*wave[:3], torch.int8, *window), exact
    taps = normal(128, 10).half()
    unscaled = (wave[0], 1.0, 127, taps, torch.ones(128), bias, 5)
    yield "wave_conv", (*unscaled, *norm, *end), exact
    yield "wave_gram", (*wave[:3], torch.float16, *window), exact
    # the padded frames share a tile with real ones, so that their results are
    # defined too
    qkv, real = normal(2, 70, 3 * 128).half() * 3, torch.tensor([65, 70])
    yield "attention", (qkv, 2, real, *rounded), half
    yield "attention", (qkv, 2, real, torch.float16), half


def first_failure(device: torch.device) -> str | None:
    """Runs every operator on a device; names the first that fails, and how."""
    for name, arguments, tolerance in trials():
        moved = [
            a.to(device).contiguous() if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]
        expected = OPERATORS[name].reference(*arguments)
        try:
            found = getattr(OPS, name)(*moved)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        # a compiler or a driver may raise anything
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"operator {name} fails: {lines[0]}"
        if isinstance(found, torch.Tensor):
            found, expected = (found,), (expected,)
        for a, b in zip(found, expected, strict=True):
            reason = difference(a, b, tolerance)
            if reason is not None:
                return f"operator {name}: the result {reason}"
    return None


def kernels_digest() -> str:
    """Hash of the kernels' source: 32 hexadecimal digits."""
    return code_identity(Path(__file__).parent)


def driver() -> str:
    """The driver's version, as far as it can be read."""
    with suppress(OSError):
        return _DRIVER.read_text().partition("\n")[0]
    return f"CUDA {torch.version.cuda}"


def _version() -> dict[str, str]:
    """Versions for which a passed trial holds."""
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return {"kernels": kernels_digest(), "driver": driver(), **versions}


def card_file(card: str, what: str) -> str:
    """Name of a JSON file about a card."""
    return f"{card}-{what}.json".replace(" ", "_").replace("/", "_")


def failure_on_card(
    device: torch.device, card: str, store: Store
) -> str | None:
    """`first_failure`, skipped for a card that passed before."""
    name, key = card_file(card, "passed"), identity(_version())
    if store.read(name, key, "trial of kernels") is not None:
        return None
    logger.info("triton: trying the kernels on %s, once", card)
    reason = first_failure(device)
    if reason is None:
        store.write(name, key, {"card": card})
    return reason
