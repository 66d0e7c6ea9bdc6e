"""Makes what the recipe needs: a small encoder, and a corpus of tones."""

import csv

import numpy
import soundfile
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

SAMPLE_RATE = 16000
# Each letter is a tone of its own; a space is silence.
TONES = {"a": 300.0, "b": 700.0, "c": 1500.0, "d": 3100.0, " ": 0.0}
SET_SIZES = {"train": 240, "valid": 6, "clean": 4, "noisy": 3}


def make_encoder(folder):
    """Writes an untrained wav2vec 2.0 of two blocks, at 62 frames a second.

    Arguments
    ---------
    folder : Path
        Where to.
    """
    torch.manual_seed(3)
    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 4,
        conv_kernel=(16, 8, 4, 4),
        conv_stride=(8, 8, 2, 2),
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=True
    ).save_pretrained(folder)


def make_text(random):
    """Two or three words of one or two letters."""
    letters = [tone for tone in TONES if tone != " "]
    words = [
        "".join(random.choice(letters, random.randint(1, 3), replace=False))
        for _ in range(random.randint(2, 4))
    ]
    return " ".join(words)


def make_audio(text, random, noise):
    """A tone for each character, of 80 to 120 ms, with some noise."""
    parts = []
    for char in text:
        time = numpy.arange(random.randint(1280, 1920)) / SAMPLE_RATE
        parts.append(0.5 * numpy.sin(2 * numpy.pi * TONES[char] * time))
    audio = numpy.concatenate(parts)
    audio += noise * random.standard_normal(len(audio))
    return audio.clip(-1, 1).astype("float32")


def make_corpus(folder):
    """Writes the sets as CSV files beside their audio.

    Arguments
    ---------
    folder : Path
        Where to.
    """
    random = numpy.random.RandomState(5)
    folder.mkdir(parents=True)
    for name, size in SET_SIZES.items():
        rows = []
        for index in range(size):
            text = make_text(random)
            noise = 0.1 if name == "noisy" else 0.02
            audio = make_audio(text, random, noise)
            file = f"{name}-{index:03}.wav"
            soundfile.write(folder / file, audio, SAMPLE_RATE)
            seconds = len(audio) / SAMPLE_RATE
            rows.append((file[:-4], seconds, f"$data_root/{file}", text))
        with open(folder / f"{name}.csv", "w", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(("ID", "duration", "wav", "wrd"))
            writer.writerows(rows)
