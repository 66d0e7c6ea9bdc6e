"""Word error rates of an inference folder: runtimes and batch sizes in turns.

Neither the float model nor the recipe is needed. Word errors of each way are
compared with those of the first one, utterance by utterance.

Example
-------
python tests/benchmarks/wer.py results/quant/1986/quantized \
    --split DATA/LibriSpeech/test-clean --device cuda \
    --backends torch triton --batches 1 8
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from speechbrain_stablequant import Recognizer, load
from speechbrain_stablequant.core.error_rates import (
    Transcript,
    paired_delta,
    score,
)
from speechbrain_stablequant.utils.timing import BatchTimes

SAMPLE_RATE = 16000


def utterances(split: Path) -> list[tuple[Path, str]]:
    """Audio and words of a split in LibriSpeech's layout, the longest first."""
    found = []
    for file in sorted(split.rglob("*.trans.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, words = line.partition(" ")
            found.append((file.with_name(f"{name}.flac"), words))
    if not found:
        sys.exit(f"{split}: no *.trans.txt below it; name a split's folder")
    # neighbors of equal length: little padding
    return sorted(found, key=lambda x: -soundfile.info(x[0]).frames)


def batches(
    items: Sequence[tuple[Path, str]], size: int
) -> Iterator[tuple[list[tuple[Path, str]], torch.Tensor, torch.Tensor]]:
    """Utterances, their padded audio, and its relative lengths."""
    for start in range(0, len(items), size):
        part = list(items[start : start + size])
        waves = []
        for path, _ in part:
            wave, rate = soundfile.read(path, dtype="float32")
            if rate != SAMPLE_RATE:
                sys.exit(f"{path}: {rate} Hz, {SAMPLE_RATE} are needed")
            waves.append(torch.from_numpy(wave))
        lengths = torch.tensor([len(wave) for wave in waves])
        yield part, pad_sequence(waves, True), lengths / lengths.max()


def transcribe(
    asr: Recognizer, items: Sequence[tuple[Path, str]], size: int, what: str
) -> tuple[list[Transcript], float]:
    """Transcripts in the order of the utterances, and seconds, without the
    first batch and what is compiled for new lengths; ``what`` names the
    progress bar."""
    made, times = [], BatchTimes()
    total = -(-len(items) // size)
    bar = tqdm(batches(items, size), what, total, dynamic_ncols=True)
    for part, wavs, lengths in bar:
        # when the text is on the host the device is done
        with times.batch():
            words, _ = asr.transcribe_batch(wavs, lengths)
        made += [
            Transcript(path.stem, reference, said)
            for (path, reference), said in zip(part, words, strict=True)
        ]
    return made, sum(times.counted(times.seconds))


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures and prints a line for each way; returns the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="that a run has written")
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--backends", nargs="+", default=["torch", "auto"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--utterances", type=int, help="only so many")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(argv)
    items = utterances(args.split)[: args.utterances]
    rows, first = [], None
    for backend in args.backends:
        asr = None  # gives its memory back before the next one takes some
        asr = load(args.folder, backend, args.device)
        for size in args.batches:
            what = f"{backend}, batch {size}"
            made, seconds = transcribe(asr, items, size, what)
            first = first or made
            rates, delta = score(made), paired_delta(first, made)
            rows.append(
                {
                    "backend": backend,
                    "runtime": asr.runtime,
                    "batch": size,
                    "wer": round(rates.wer, 3),
                    "cer": round(rates.cer, 3),
                    "delta": round(delta.delta, 3),
                    "low": round(delta.low, 3),
                    "high": round(delta.high, 3),
                    "seconds": round(seconds, 3),
                }
            )
            print(
                f"{what} ({rows[-1]['runtime']}): WER {rates.wer:.2f}, CER "
                f"{rates.cer:.2f}, {delta.delta:+.2f} ({delta.low:+.2f} to "
                f"{delta.high:+.2f}), {seconds:.2f} s",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
