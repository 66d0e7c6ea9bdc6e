"""A quantized model on disk: ``model.safetensors`` beside its ``plan.json``.

The file holds each quantized weight packed to its bits, its scales, and every
other parameter and buffer, in half precision by default. Its header describes
each layer and has a checksum over everything and one for each file that belongs
to the model, so that a damaged or mixed folder is an error. Nothing is pickled.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ..core.integer_layer import IntegerLayer
from ..core.packing import pack
from ..core.plan import PLAN_FILE, QuantizationPlan
from ..runtimes import probe as probes
from ..runtimes.probe import Probe
from ..utils.files import parse_json, plain_name, write_atomic
from ..utils.tensor_bytes import tensors_to_bytes
from ..utils.typed import one_line, short, typed
from .errors import CheckpointError
from .layer_row import LayerRow, check_scales, describe_layer, read_layer
from .stored_floats import FLOAT_DTYPES, stored_float, widened
from .tensor_file import TensorFile

FORMAT = "speechbrain_stablequant"
#: Format versions of files with and without a probe.
VERSION, VERSION_WITHOUT_PROBE = 2, 1
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a folder.

    ``integers`` are IntegerLayers by name; ``floats`` is everything else by its
    name in the state dict, in float32, including the biases of integer layers.
    ``files`` are the checked files; ``probe`` is None in folders of earlier
    versions.
    """

    plan: QuantizationPlan
    integers: dict[str, IntegerLayer] = field(repr=False)
    floats: dict[str, torch.Tensor] = field(repr=False)
    float_dtype: str
    checksum: str
    files: tuple[str, ...] = ()
    probe: Probe | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Description:
    """The description in the file's header."""

    float_dtype: Literal["float16", "float32"]
    files: dict[str, str]
    layers: dict[str, LayerRow]


# -- writing ---------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    plan: QuantizationPlan,
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str = "float16",
    companions: Iterable[str] = (),
    probe: Probe | None = None,
) -> str:
    """Writes a quantized model and its plan.

    Arguments
    ---------
    folder : str or Path
        An existing folder.
    plan : QuantizationPlan
        What was decided.
    integers : Mapping
        Exactly the layers that the plan quantizes, by name.
    floats : Mapping
        Everything else, from :func:`float_state`; the biases of the integer
        layers are taken from ``integers``.
    float_dtype : str
        ``"float16"`` or ``"float32"``.
    companions : iterable of str
        Files of the folder whose content is checked on loading.
    probe : Probe or None
        A short input with its answer, for runtimes to prove themselves.

    Returns
    -------
    str
        The checksum.

    Raises
    ------
    CheckpointError
        The layers are not those of the plan.
    """
    folder = Path(folder)
    if float_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"float_dtype: '{float_dtype}' is not one of "
            f"{', '.join(FLOAT_DTYPES)}"
        )
    _check_layers(
        {name: describe_layer(layer) for name, layer in integers.items()},
        plan,
        "the model to save",
    )
    plan.save(folder / PLAN_FILE)
    files = {
        name: _file_digest(folder / bare_name(name))
        for name in (PLAN_FILE, *companions)
    }
    description = json.dumps(
        {
            "float_dtype": float_dtype,
            "files": files,
            "layers": {n: describe_layer(x) for n, x in integers.items()},
        },
        sort_keys=True,
    )
    tensors = _tensors(integers, floats, float_dtype)
    if probe is not None:
        tensors.update(probe.tensors())
    checksum = _digest(description, tensors)
    header = {
        "format": FORMAT,
        "version": str(VERSION if probe else VERSION_WITHOUT_PROBE),
        "checksum": checksum,
        "description": description,
    }
    write_atomic(folder / WEIGHTS_FILE, tensors_to_bytes(tensors, header))
    return checksum


def _tensors(
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str,
) -> dict[str, torch.Tensor]:
    tensors = {
        name: stored_float(value, float_dtype) for name, value in floats.items()
    }
    for name, layer in integers.items():
        weight = layer.weight.cpu().contiguous()
        tensors[f"{name}.weight"] = pack(weight, layer.weight_bits)
        for part in ("weight_scale", "activation_scale"):
            scale = getattr(layer, part).detach().cpu().float()
            tensors[f"{name}.{part}"] = scale.contiguous()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = stored_float(layer.bias, float_dtype)
    # Store tied tensors twice: safetensors refuses shared memory.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _check_layers(
    layers: Mapping[str, Mapping], plan: QuantizationPlan, where: str
) -> None:
    """Checks that the layers are those that the plan quantizes."""
    planned = {
        row.name: (row.kind, row.quant.weight_bits, row.quant.activation_bits)
        for row in plan.layers
        if row.quant is not None
    }
    found = {
        name: (row["kind"], row["weight_bits"], row["activation_bits"])
        for name, row in layers.items()
    }
    for name in [*planned, *found]:
        if planned.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: layer '{name}' is {_words(found.get(name))}, in "
                f"{PLAN_FILE} it is {_words(planned.get(name))}; they belong "
                "to different models"
            )


def _words(row: tuple | None) -> str:
    if row is None:
        return "not there"
    kind, weight_bits, activation_bits = row
    return f"{kind} W{weight_bits}A{activation_bits}"


# -- checksums and names ---------------------------------------------------


def _digest(description: str, tensors: Mapping[str, torch.Tensor]) -> str:
    def chunks(name: str) -> Iterator[Any]:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy()

    return _digest_of(description, tensors, chunks)


def _digest_of(
    description: str,
    outlines: Mapping[str, torch.Tensor],
    chunks: Callable[[str], Iterable[Any]],
) -> str:
    """Digests a description and tensors that are read in chunks."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(outlines):
        tensor = outlines[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        for chunk in chunks(name):
            digest.update(chunk)
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def bare_name(name: Any) -> str:
    """Returns a plain file name, or raises CheckpointError."""
    try:
        return plain_name(name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


# -- reading ---------------------------------------------------------------


def load_checkpoint(
    folder: str | Path, weights: bool = True, needs: Iterable[str] = ()
) -> Checkpoint:
    """Reads a quantized model and checks all of it.

    Arguments
    ---------
    folder : str or Path
        Holds ``model.safetensors`` and ``plan.json``.
    weights : bool
        False leaves integer weights in the file, which stays open: each is
        read by ``IntegerLayer.loaded``.
    needs : iterable of str
        Files that must be among those whose content is checked, beside the
        plan.

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointError
        A file is missing, damaged, mixed up, of another version or foreign.
    """
    path = Path(folder) / WEIGHTS_FILE
    file = _open(path)
    description = _read_header(path, file.metadata)
    for name in sorted({PLAN_FILE, *needs} - set(description.files)):
        raise CheckpointError(
            f"{path}: does not name {name} as one of its files, so that it "
            "may be of another model; copy or make the folder again"
        )
    outlines = {name: file.outline(name) for name in file.names}
    text, checksum = file.metadata["description"], file.metadata["checksum"]
    if _digest_of(text, outlines, file.chunks) != checksum:
        raise CheckpointError(
            f"{path}: is damaged: its content does not have the checksum in "
            "its header; copy or make it again"
        )
    for name, digest in description.files.items():
        _check_companion(Path(folder) / bare_name(name), digest, path)
    # The plan's tensors are already part of the integers.
    plan = _load_plan(Path(folder) / PLAN_FILE)
    rows = {name: asdict(row) for name, row in description.layers.items()}
    _check_layers(rows, plan, str(path))
    try:
        integers = {
            name: read_layer(name, row, file, outlines)
            for name, row in description.layers.items()
        }
        check_scales(integers, plan)
        probe = _read_probe(file, outlines)
        if (probe is not None) != (file.metadata["version"] == str(VERSION)):
            raise ValueError("its version is not that of its probe")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is not consistent ({one_line(error)}); make it again"
        ) from error
    if weights:
        integers = {name: layer.loaded() for name, layer in integers.items()}
    floats = {name: widened(file.read(name)) for name in outlines}
    for name, layer in integers.items():
        if layer.bias is not None:
            # One copy of each bias.
            floats[f"{name}.bias"] = layer.bias
    return Checkpoint(
        plan,
        integers,
        floats,
        description.float_dtype,
        checksum,
        tuple(description.files),
        probe,
    )


def signed_files(path: str | Path) -> list[str]:
    """Returns the names of the files that belong to a ``model.safetensors``."""
    path = Path(path)
    description = _read_header(path, _open(path).metadata)
    return [bare_name(name) for name in description.files]


def _load_plan(path: Path) -> QuantizationPlan:
    try:
        return QuantizationPlan.load(path, with_tensors=False)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _open(path: Path) -> TensorFile:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; give the folder that a "
            "quantization run wrote"
        )
    try:
        return TensorFile(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is damaged or no safetensors file ({one_line(error)}); "
            "copy or make it again"
        ) from error


def _read_header(path: Path, header: Mapping[str, str]) -> _Description:
    kind, version = header.get("format"), header.get("version")
    if kind != FORMAT:
        raise CheckpointError(
            f"{path}: is not a quantized model of {FORMAT} (its format is "
            f"{short(kind)}); give the folder that a quantization run wrote"
        )
    if version not in (str(VERSION), str(VERSION_WITHOUT_PROBE)):
        raise CheckpointError(
            f"{path}: has version {short(version)} of the format, this "
            f"package reads {VERSION_WITHOUT_PROBE} and {VERSION}; install "
            f"the version of {FORMAT} that wrote it, or quantize again"
        )
    try:
        text, _ = (
            typed(header.get(key), str, key)
            for key in ("description", "checksum")
        )
        found = typed(parse_json(text), _Description, "description")
        for name in found.layers:
            if not name.isprintable():
                raise ValueError(f"layer {short(name)}")
        return found
    except ValueError as error:
        raise CheckpointError(
            f"{path}: is damaged: its header does not describe its layers "
            f"({one_line(error)}); copy or make it again"
        ) from error


def _check_companion(file: Path, digest: str, path: Path) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: there is no such file, and {path.name} needs it; copy "
            "the whole folder"
        )
    if _file_digest(file) != digest:
        raise CheckpointError(
            f"{file}: is not the file that {path.name} was written with: it "
            "was edited or is of another model; copy the whole folder again"
        )


def _read_probe(
    file: TensorFile, outlines: dict[str, torch.Tensor]
) -> Probe | None:
    """Reads the probe, if there is one; removes its tensors from
    ``outlines``."""
    names = [name for name in outlines if name.startswith(probes.PREFIX)]
    probes.check_size(outlines.pop(name) for name in names)
    if not names:
        return None
    return Probe.from_tensors({name: file.read(name) for name in names})
