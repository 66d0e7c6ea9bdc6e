#!/usr/bin/env python3
"""Make the demo checkpoint: a small wav2vec 2.0 CTC model in a HuggingFace
folder, before training (init) and after it (export).

> python make_demo_checkpoint.py init --folder demo/initial
> python train.py hparams/train_demo.yaml --data_folder CORPUS
> python make_demo_checkpoint.py export --initial demo/initial \
    --save_folder results/train_demo/1986/save --folder demo/checkpoint

Authors
 * The speechbrain_stablequant developers 2026
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

# The order of the LibriSpeech checkpoints: markers, then letters by frequency.
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|"]
VOCABULARY += list("ETAONIHSRDLUMWCFGYPBVK'XJQZ")


def make_config(
    channels: int = 96, width: int = 256, layers: int = 4
) -> Wav2Vec2Config:
    """Describes a small model with the structure of wav2vec2-large: layer norm
    and bias in the front end, normalization before each block.

    Arguments
    ---------
    channels : int
        Channels of the convolutions.
    width : int
        Width of the transformer.
    layers : int
        Transformer blocks.

    Returns
    -------
    Wav2Vec2Config
        The description.

    Example
    -------
    >>> make_config().num_feat_extract_layers
    7
    """
    return Wav2Vec2Config(
        vocab_size=len(VOCABULARY),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        conv_dim=(channels,) * 7,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=64,
        num_conv_pos_embedding_groups=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )


def save_processor(folder: Path) -> None:
    """Writes the tokenizer's and the feature extractor's files.

    Arguments
    ---------
    folder : Path
        The model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {label: index for index, label in enumerate(VOCABULARY)}
    file = folder / "vocab.json"
    file.write_text(json.dumps(vocabulary, indent=1), encoding="utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(file), do_lower_case=False)
    tokenizer.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=True
    ).save_pretrained(folder)
    # transformers 5 writes the markers into tokenizer_config.json only.
    markers = {
        f"{name}_token": getattr(tokenizer, f"{name}_token")
        for name in ("bos", "eos", "unk", "pad")
    }
    file = folder / "special_tokens_map.json"
    file.write_text(json.dumps(markers, indent=1), encoding="utf-8")


def init(folder: Path, seed: int) -> None:
    """Writes an untrained model.

    Arguments
    ---------
    folder : Path
        Where to.
    seed : int
        Seed of the weights.
    """
    torch.manual_seed(seed)
    model = Wav2Vec2ForCTC(make_config())
    model.save_pretrained(folder)
    save_processor(folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {count / 1e6:.2f} M parameters")


def export(initial: Path, save_folder: Path, folder: Path) -> None:
    """Writes a trained model in half precision.

    Arguments
    ---------
    initial : Path
        The folder that training started from.
    save_folder : Path
        SpeechBrain's checkpoints; the one with the lowest WER is taken.
    folder : Path
        Where to.
    """
    from speechbrain.utils.checkpoints import Checkpointer

    found = Checkpointer(save_folder).find_checkpoint(min_key="WER")
    if found is None:
        sys.exit(
            f"--save_folder: no checkpoint in {save_folder}: train first, with"
            " hparams/train_demo.yaml"
        )
    model = Wav2Vec2ForCTC.from_pretrained(initial, dtype=torch.float32)
    states = {}
    for name in ("wav2vec2", "ctc_lin"):
        states[name] = torch.load(
            found.paramfiles[name], map_location="cpu", weights_only=True
        )
    encoder = {
        key.removeprefix("model."): value
        for key, value in states["wav2vec2"].items()
    }
    model.wav2vec2.load_state_dict(encoder)
    model.lm_head.load_state_dict(states["ctc_lin"])
    model.half().save_pretrained(folder)
    # It is written for its owner alone.
    (folder / "model.safetensors").chmod(0o644)
    save_processor(folder)
    print(f"{folder}: dev WER {found.meta['WER']:.2f} from {found.path.name}")


def main(argv: list | None = None) -> None:
    """Does what the command line asks for.

    Arguments
    ---------
    argv : list of str
        Arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("init", help="write an untrained model")
    sub.add_argument("--folder", type=Path, required=True)
    sub.add_argument("--seed", type=int, default=1986)
    sub = commands.add_parser("export", help="write a trained model")
    sub.add_argument("--initial", type=Path, required=True)
    sub.add_argument("--save_folder", type=Path, required=True)
    sub.add_argument("--folder", type=Path, required=True)
    args = vars(parser.parse_args(argv))
    command = {"init": init, "export": export}[args.pop("command")]
    command(**args)


if __name__ == "__main__":
    main()
