"""A quantized model on disk: ``model.safetensors`` beside its ``plan.json``.

The file holds packed weights, their scales, and every other parameter and
buffer. Its header describes each layer and has checksums of everything and of
each file that belongs to the model: a damaged or mixed folder is an error.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from ..core.integer_layer import IntegerLayer
from ..core.packing import pack
from ..core.plan import PLAN_FILE, QuantizationPlan
from ..runtimes import probe as probes
from ..runtimes.probe import Probe
from ..utils.files import file_digest, parse_json, plain_name, write_atomic
from ..utils.tensor_bytes import tensors_to_bytes
from ..utils.typed import one_line, short, typed
from .errors import CheckpointError, reading
from .layer_row import LayerRow, describe_layer, read_layer
from .stored_floats import loaded_floats, stored_floats
from .tensor_file import TensorFile

FORMAT = "speechbrain_stablequant"
#: Format versions of files with and without a probe.
VERSION, VERSION_WITHOUT_PROBE = 2, 1
WEIGHTS_FILE = "model.safetensors"
#: Where a run writes a model, below its folder.
MODEL_FOLDER = "model"


def model_folder(folder: str | Path) -> Path:
    """The folder of a model: itself, or the one inside a run's folder."""
    inner = Path(folder) / MODEL_FOLDER
    return inner if (inner / WEIGHTS_FILE).is_file() else Path(folder)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a folder.

    Weights of ``integers`` stay in the open file until ``IntegerLayer.loaded``;
    ``floats`` is everything else by its name in the state dict, in float32,
    biases of integer layers included. Earlier versions wrote no ``probe``.
    """

    plan: QuantizationPlan
    integers: dict[str, IntegerLayer] = field(repr=False)
    floats: dict[str, torch.Tensor] = field(repr=False)
    checksum: str
    probe: Probe | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Description:
    """The description in the file's header."""

    float_dtype: Literal["float16", "float32"]
    files: dict[str, str]
    layers: dict[str, LayerRow]


def save_checkpoint(
    folder: str | Path,
    plan: QuantizationPlan,
    integers: Mapping[str, IntegerLayer],
    floats: Mapping[str, torch.Tensor],
    float_dtype: str = "float16",
    companions: Iterable[str] = (),
    probe: Probe | None = None,
) -> str:
    """Writes a quantized model and its plan into an existing folder.

    ``floats`` is what :func:`float_state` returns; biases of integer layers are
    taken from ``integers``. The checksums of ``companions``, other files of the
    folder, are stored. Returns the checksum of the weights.
    """
    folder = Path(folder)
    _check_layers(integers, plan, "the model to save")
    # The integers already hold the tensors of the plan.
    plan.save(folder / PLAN_FILE, with_tensors=False)
    files = {
        name: file_digest(folder / plain_name(name))
        for name in (PLAN_FILE, *companions)
    }
    layers = {name: describe_layer(layer) for name, layer in integers.items()}
    content = {"float_dtype": float_dtype, "files": files, "layers": layers}
    description = json.dumps(content, sort_keys=True)
    tensors = stored_floats(integers, floats, float_dtype, plan.weight_only)
    for name, layer in integers.items():
        weight = layer.loaded().weight.cpu().contiguous()
        tensors[f"{name}.weight"] = pack(weight, layer.weight_bits)
        for part in ("weight_scale", "activation_scale"):
            scale = getattr(layer, part).detach().cpu().float()
            tensors[f"{name}.{part}"] = scale.contiguous()
    if probe is not None:
        tensors.update(probe.tensors())
    checksum = _digest(description, tensors)
    version = str(VERSION if probe else VERSION_WITHOUT_PROBE)
    header = {"format": FORMAT, "version": version, "checksum": checksum}
    header["description"] = description
    write_atomic(folder / WEIGHTS_FILE, tensors_to_bytes(tensors, header))
    return checksum


def _check_layers(
    layers: Mapping[str, IntegerLayer | LayerRow],
    plan: QuantizationPlan,
    where: str,
) -> None:
    """Checks that the layers are those that the plan quantizes."""
    rows = (row for row in plan.layers if row.quant is not None)
    planned = {row.name: _words(row.kind, row.quant) for row in rows}
    found = {name: _words(row.kind, row) for name, row in layers.items()}
    for name in [*planned, *found]:
        here, there = (x.get(name, "not there") for x in (found, planned))
        if here != there:
            raise CheckpointError(
                f"{where}: layer '{name}' is {here}, in {PLAN_FILE} it is "
                f"{there}; they belong to different models"
            )


def _words(kind: str, bits: Any) -> str:
    return f"{kind} W{bits.weight_bits}A{bits.activation_bits}"


def _digest(
    description: str,
    tensors: Mapping[str, torch.Tensor],
    chunks: Callable[[str], Iterable[Any]] | None = None,
) -> str:
    """Digests a description and tensors, whose bytes ``chunks`` may read."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if chunks is None:
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        else:
            for chunk in chunks(name):
                digest.update(chunk)
    return digest.hexdigest()


def load_checkpoint(
    folder: str | Path,
    needs: Iterable[str] = (),
    expected: str | None = None,
) -> Checkpoint:
    """Reads a quantized model and checks all of it.

    Files in ``needs`` must be among those whose checksums it has; ``expected``
    is its own, if known. Raises CheckpointError for what is missing, damaged,
    mixed up or foreign.
    """
    path = model_folder(folder) / WEIGHTS_FILE
    file, description = _open(path)
    for name in sorted({PLAN_FILE, *needs} - set(description.files)):
        raise CheckpointError(
            f"{path}: does not list {name} among its files, so {name} may "
            "belong to another model; copy or make the folder again"
        )
    outlines = file.outlines()
    text, checksum = file.metadata["description"], file.metadata["checksum"]
    if _digest(text, outlines, file.chunks) != checksum:
        raise CheckpointError(
            f"{path}: is damaged: its content does not have the checksum in "
            "its header; copy or make it again"
        )
    if expected not in (None, checksum):
        raise CheckpointError(
            f"{path}: is not the model that hyperparams.yaml was written for; "
            "copy the whole folder, and give from_hparams no savedir that "
            "another model was loaded with"
        )
    for name, digest in description.files.items():
        _check_companion(path.with_name(name), digest, path)
    try:
        # The plan's tensors are already part of the integers.
        plan = QuantizationPlan.load(path.with_name(PLAN_FILE), False)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    _check_layers(description.layers, plan, str(path))
    quants = plan.quants()
    with reading(path, "is not consistent", "make it again"):
        integers = {
            name: read_layer(name, row, quants[name], file, outlines)
            for name, row in description.layers.items()
        }
        probe = _read_probe(file, outlines)
        floats = loaded_floats(outlines, file.read)
    for name, layer in integers.items():
        if layer.bias is not None:
            # One copy of each bias.
            floats[f"{name}.bias"] = layer.bias
    return Checkpoint(plan, integers, floats, checksum, probe)


def signed_files(path: str | Path) -> list[str]:
    """Returns the names of the files that belong to a ``model.safetensors``."""
    return list(_open(Path(path))[1].files)


def _open(path: Path) -> tuple[TensorFile, _Description]:
    """Opens a weights file and reads its header."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; give the folder that a "
            "quantization run wrote"
        )
    try:
        file = TensorFile(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is damaged or no safetensors file ({one_line(error)}); "
            "copy or make it again"
        ) from error
    kind, version = file.metadata.get("format"), file.metadata.get("version")
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
    wrong = "is damaged: its header does not describe its layers"
    with reading(path, wrong):
        typed(file.metadata.get("checksum"), str, "checksum")
        text = typed(file.metadata.get("description"), str, "description")
        found = typed(parse_json(text), _Description, "description")
        for name in found.files:
            plain_name(name)
        for name in found.layers:
            if not name.isprintable():
                raise ValueError(f"layer {short(name)}")
    return file, found


def _check_companion(file: Path, digest: str, path: Path) -> None:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: there is no such file, and {path.name} needs it; copy "
            "the whole folder"
        )
    if file_digest(file) != digest:
        raise CheckpointError(
            f"{file}: is not the file that {path.name} was written with: it "
            "was edited or is of another model; copy the whole folder again"
        )


def _read_probe(
    file: TensorFile, outlines: dict[str, torch.Tensor]
) -> Probe | None:
    """Reads the probe, if any; removes its tensors from ``outlines``."""
    names = [name for name in outlines if name.startswith(probes.PREFIX)]
    if bool(names) != (file.metadata["version"] == str(VERSION)):
        raise ValueError("its version is not that of its probe")
    probes.check_size(outlines.pop(name) for name in names)
    if not names:
        return None
    return Probe.from_tensors({name: file.read(name) for name in names})
