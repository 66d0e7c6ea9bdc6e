#!/usr/bin/env python3
"""Make a folder as SpeechBrain's models on the HuggingFace Hub have it, for
EncoderASR, from a HuggingFace wav2vec 2.0 or HuBERT CTC checkpoint.

> python make_hub_folder.py results/hub --checkpoint demo/checkpoint

Authors
 * The speechbrain_stablequant developers 2026
"""

import argparse
from pathlib import Path

import torch
from speechbrain.inference.ASR import EncoderASR
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from train import checkpoint_encoder
from transformers import AutoModelForCTC

HYPERPARAMS = """\
sample_rate: 16000
blank_index: {blank}
wav2vec2_hub: {checkpoint}

wav2vec2: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2
    source: !ref <wav2vec2_hub>
    save_path: !ref <wav2vec2_hub>
    output_norm: False
    freeze: True
    dtype: float32

enc: !new:torch.nn.Identity

ctc_lin: !new:torch.nn.Linear
    in_features: {width}
    out_features: {labels}

log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True

encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    wav2vec2: !ref <wav2vec2>
    enc: !ref <enc>
    ctc_lin: !ref <ctc_lin>
    log_softmax: !ref <log_softmax>

modules:
    encoder: !ref <encoder>

tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder

decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: !ref <blank_index>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        wav2vec2: !ref <wav2vec2>
        ctc_lin: !ref <ctc_lin>
        tokenizer: !ref <tokenizer>
"""


def make_hub_folder(folder: Path, checkpoint: str) -> None:
    """Writes the YAML, the parameters and the labels.

    Arguments
    ---------
    folder : Path
        The folder to make.
    checkpoint : str
        Folder of a HuggingFace CTC checkpoint, or its hub id.
    """
    if Path(checkpoint).is_dir():
        checkpoint = str(Path(checkpoint).resolve())
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Wav2Vec2(
        checkpoint, checkpoint, output_norm=False, dtype="float32"
    )
    torch.save(encoder.state_dict(), folder / "wav2vec2.ckpt")
    head = AutoModelForCTC.from_pretrained(checkpoint, dtype="float32").lm_head
    torch.save(head.state_dict(), folder / "ctc_lin.ckpt")
    labels = checkpoint_encoder(checkpoint, str(folder / "tokenizer.ckpt"))
    text = HYPERPARAMS.format(
        blank=labels.get_blank_index(),
        checkpoint=checkpoint,
        width=head.in_features,
        labels=head.out_features,
    )
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    EncoderASR.from_hparams(source=str(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", default="demo/checkpoint")
    arguments = parser.parse_args()
    make_hub_folder(arguments.folder, arguments.checkpoint)
    print(f"{arguments.folder}: EncoderASR loads it")
