"""Small quantized folders with a tokenizer, and ways to change them."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder import weights_file as checkpoint
from speechbrain_stablequant.folder.write import RecognizerSource, write_folder
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.utils.files import file_digest

LABELS = ["<blank>", " ", *"ABCDEFGHIJ"]
HEADS = {
    "enc": "enc: !new:speechbrain.lobes.models.VanillaNN.VanillaNN\n"
    "  input_shape: [null, null, 32]\n"
    "  activation: !name:torch.nn.LeakyReLU\n"
    "  dnn_blocks: 2\n"
    "  dnn_neurons: 24\n",
    "ctc_lin": "ctc_lin: !new:speechbrain.nnet.linear.Linear\n"
    "  input_size: 24\n"
    "  n_neurons: 12\n",
}
SETTINGS = {
    "key": "wav2vec2",
    "use_lengths": True,
    "normalize_wav": True,
    "output_norm": False,
    "output_all_hiddens": False,
}


def write(
    folder: Path,
    modules: Mapping[str, nn.Module],
    heads: Mapping[str, str] = HEADS,
    float_inputs: Collection[str] = (),
    **changes: Any,
) -> None:
    """Writes the folder of a tiny recognizer, quantized to eight bits.

    Arguments
    ---------
    folder : Path
        Where to; is made.
    modules : Mapping
        Those of ``make_tiny_modules``.
    heads : Mapping
        YAML of each module behind the encoder.
    float_inputs : Collection
        Ends of the names of layers whose inputs stay float.
    **changes
        Of the RecognizerSource.
    """
    folder.mkdir(parents=True)
    labels = CTCTextEncoder()
    labels.insert_blank(LABELS[0], 0)
    for label in LABELS[1:]:
        labels.add_label(label)
    labels.save(str(folder / "labels"))
    tokenizer = (folder / "labels").read_bytes()
    (folder / "labels").unlink()
    quant = LayerQuant(8, 8, 3.0, "mse")
    layers = find_layers(modules, list(modules))
    quants = {
        x.name: quant.with_float_input()
        if x.name.endswith(tuple(float_inputs))
        else quant
        for x in layers
    }
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quants[x.name], 3.0, 100.0, "")
        for x in layers
    ]
    config = json.loads(modules["wav2vec2"].model.config.to_json_string(False))
    source = {
        "encoder": SETTINGS,
        "config": json.dumps(config),
        "heads": dict(heads),
        "tokenizer_class": "speechbrain.dataio.encoder.CTCTextEncoder",
        "tokenizer_file": "label_encoder.txt",
        "tokenizer": tokenizer,
        "blank_index": 0,
        "sample_rate": 16000,
        **changes,
    }
    write_folder(
        folder,
        modules,
        QuantizationPlan("max", 8, 8, "", {}, {}, [], rows),
        {x.name: integer_layer(x, quants[x.name]) for x in layers},
        "float16",
        RecognizerSource(**source),
    )


def sign(
    folder: Path, change: Callable[[dict, dict], None] = lambda _, x: None
) -> None:
    """Signs a folder again, as whoever makes one can: all checksums are
    right then.

    Arguments
    ---------
    folder : Path
        A quantized folder of which files were changed.
    change : callable
        Changes the description and the tensors of its weights.
    """
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors: dict[str, torch.Tensor] = load_file(path)
    description = json.loads(header["description"])
    change(description, tensors)
    files = description.get("files")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in list(files) if isinstance(files, dict) else []:
        if name in there:
            files[name] = file_digest(folder / name)
        elif name == "recognizer.json":
            del files[name]
    before = header["checksum"]
    header["description"] = json.dumps(description)
    header["checksum"] = checkpoint._digest(header["description"], tensors)
    save_file(tensors, path, header)
    yaml = folder / "hyperparams.yaml"
    if yaml.is_file():
        text = yaml.read_text(encoding="utf-8")
        yaml.write_text(text.replace(before, header["checksum"]), "utf-8")


def forget_spec(folder: Path) -> None:
    """Makes a folder one that was written before ``recognizer.json``."""
    (folder / "recognizer.json").unlink()
    sign(folder)
