"""Times whole transcriptions of a Whisper checkpoint: in floating point with
SpeechBrain's class, quantized by us, and by CTranslate2 in int8.

All take turns on each utterance. ``FOLDER`` is the ``model`` folder that the
recipe has written; it decodes as its recipe did, so ``--beam`` must be the
recipe's ``test_beam_size``. CTranslate2 comes with the extra ``bench``.

Example
-------
python tests/benchmarks/whisper.py whisper-base \
    results/quant_whisper/1986/quantized/model --split DATA/mini-test
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import machine
from speechbrain.inference.ASR import WhisperASR
from wer import SAMPLE_RATE, batches, utterances

from speechbrain_stablequant.core.error_rates import Transcript, score
from speechbrain_stablequant.runtimes.cpu import cpu_class

FLOAT = """
language: {language}
sample_rate: 16000
normalized_transcripts: False
whisper: !new:speechbrain.integrations.huggingface.whisper.Whisper
    source: {source}
    save_path: {cache}
    language: {language}
    task: transcribe
decoder: !new:speechbrain.decoders.seq2seq.S2SWhisper{searcher}
    min_decode_ratio: 0.0
    max_decode_ratio: 1.0
    {options}
modules: {{whisper: !ref <whisper>, decoder: !ref <decoder>}}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
"""

Transcribe = Callable[[torch.Tensor], str]


def by_speechbrain(folder: str | Path) -> Transcribe:
    """SpeechBrain's class on a folder, ours or a float one."""
    asr = WhisperASR.from_hparams(str(folder), savedir=tempfile.mkdtemp())
    # What is compared is normalized later.
    asr.hparams.normalized_transcripts = False
    return lambda wavs: asr.transcribe_batch(wavs, torch.ones(1))[0][0]


def in_float(checkpoint: str, language: str, beam: int) -> Transcribe:
    """The checkpoint in SpeechBrain's wrapper."""
    greedy = beam == 1
    with tempfile.TemporaryDirectory() as folder:
        text = FLOAT.format(
            source=checkpoint,
            cache=f"{folder}/cache",
            language=language,
            searcher="GreedySearcher" if greedy else "BeamSearcher",
            options="model: !ref <whisper>"
            if greedy
            else f"module: [!ref <whisper>]\n    beam_size: {beam}",
        )
        Path(folder, "hyperparams.yaml").write_text(text)
        return by_speechbrain(folder)


def by_ctranslate2(
    checkpoint: str, language: str, beam: int, threads: int
) -> Transcribe:
    """CTranslate2 with int8 weights."""
    import ctranslate2
    from transformers import WhisperFeatureExtractor, WhisperTokenizer

    with tempfile.TemporaryDirectory() as folder:
        ctranslate2.converters.TransformersConverter(checkpoint).convert(
            f"{folder}/ct2", quantization="int8"
        )
        model = ctranslate2.models.Whisper(
            f"{folder}/ct2", compute_type="int8", intra_threads=threads
        )
    features = WhisperFeatureExtractor.from_pretrained(checkpoint)
    tokenizer = WhisperTokenizer.from_pretrained(
        checkpoint, language=language, task="transcribe"
    )
    prompt = tokenizer.prefix_tokens

    def transcribe(wavs: torch.Tensor) -> str:
        mel = features(
            wavs[0].numpy(), sampling_rate=SAMPLE_RATE, return_tensors="np"
        )
        view = ctranslate2.StorageView.from_array(mel.input_features)
        found = model.generate(view, [prompt], beam_size=beam)
        return tokenizer.decode(found[0].sequences_ids[0], True)

    return transcribe


def ways(args: argparse.Namespace) -> Iterator[tuple[str, Transcribe]]:
    """What is timed, by name."""
    yield "torch_fp32", in_float(args.checkpoint, args.language, args.beam)
    for folder in args.folders:
        yield folder, by_speechbrain(folder)
    try:
        made = by_ctranslate2(
            args.checkpoint, args.language, args.beam, args.threads
        )
        yield "ctranslate2_int8", made
    except ImportError:
        print("ctranslate2_int8: pip install -e '.[bench]'")


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", help="in HuggingFace's format")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--utterances", type=int, help="only so many")
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--language", default="english")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine("cpu") | {"cpu_class": cpu_class().name})
    from transformers import WhisperTokenizer

    normalize = WhisperTokenizer.from_pretrained(args.checkpoint).normalize
    timed = list(ways(args))
    made: dict[str, list[Transcript]] = {name: [] for name, _ in timed}
    spent = {name: [0.0, 0.0] for name, _ in timed}
    items = utterances(args.split)[: args.utterances]
    with torch.no_grad():
        # A first call compiles.
        for _, wavs, _ in batches(items[-2:], 1):
            for _, run in timed:
                run(wavs)
        for turn, (part, wavs, _) in enumerate(batches(items, 1)):
            path, reference = part[0]
            for shift in range(len(timed)):
                name, run = timed[(turn + shift) % len(timed)]
                clock, cpu = time.perf_counter(), time.process_time()
                said = run(wavs)
                spent[name][0] += time.perf_counter() - clock
                spent[name][1] += time.process_time() - cpu
                texts = normalize(reference), normalize(said)
                made[name].append(Transcript(path.stem, *texts))
    rows = []
    for name, (clock, cpu) in spent.items():
        same = sum(
            one.hypothesis == two.hypothesis
            for one, two in zip(made[name], made["torch_fp32"], strict=True)
        )
        row = {
            "executor": name,
            "seconds": round(clock, 2),
            "cpu_seconds": round(cpu, 2),
            "gain": round(spent["torch_fp32"][0] / clock, 2),
            "wer": round(score(made[name]).wer, 2),
            "as_float": f"{same} of {len(items)}",
        }
        rows.append(row)
        print(" ".join(f"{key} {value}" for key, value in row.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
