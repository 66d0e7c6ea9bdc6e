"""Runs upstream's unedited recipes with our block: what each of them says.

Needs a checkout of SpeechBrain with its recipes, of which nothing is changed:

    git clone --depth 1 https://github.com/speechbrain/speechbrain

and the packages that some of its recipes ask for (``pandas``, ``jsonlines``).
Each row imitates a corpus in its layout with short speech, makes small models
and tokenizers, appends the block to a copy of the recipe's YAML, and runs
upstream's script: it trains for an epoch, evaluates the float model, quantizes
and evaluates again. Then SpeechBrain's own class loads the folder and
transcribes the same files.

Example
-------
python tests/benchmarks/upstream.py --checkout ../speechbrain \
    --rows librispeech-ctc-wav2vec2,timit-ctc --out results/upstream
"""

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from upstream_recipes import check, corpora, models
from upstream_recipes.rows import COMMON, ROWS, scaled

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SPEECH = ROOT / "recipes/LibriSpeech/ASR/CTC/demo/LibriSpeech"
# What each recipe imports: once, before the processes of the rows are forked.
_IMPORTS = (
    "speechbrain.inference.ASR",
    "speechbrain.integrations.huggingface.wav2vec2",
    "speechbrain.integrations.huggingface.whisper",
    "transformers.models.wav2vec2.modeling_wav2vec2",
    "transformers.models.whisper.modeling_whisper",
)
_BLOCK = {
    "method": "mse",
    "weight_bits": 8,
    "activation_bits": 8,
    "calibration": {"num_utterances": 4},
    # After one epoch the models say nothing that is right.
    "search": {"max_float_wer": 1000000},
}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="default: all")
    parser.add_argument("--speech", type=Path, default=SPEECH)
    parser.add_argument(
        "--splits",
        nargs=3,
        type=Path,
        metavar=("TRAIN", "VALID", "TEST"),
        help="all utterances of these folders instead, to train models that "
        "recognize something",
    )
    parser.add_argument(
        "--set", default="{}", help="more overrides of the recipes, as YAML"
    )
    parser.add_argument(
        "--installed",
        action="store_true",
        help="the recipes run with the installed SpeechBrain, not theirs",
    )
    parser.add_argument(
        "--backends", default="torch,auto", help="each a variant of the block"
    )
    parser.add_argument("--block", default="{}", help="more keys, as YAML")
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        help="models so many times wider, and deeper: for times",
    )
    parser.add_argument(
        "--limit", type=int, default=900, help="seconds of a recipe or a check"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train again what was trained"
    )
    args = parser.parse_args()
    args.rows = args.rows.split(",")
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"--rows: no {name}; there are {', '.join(ROWS)}")
    return args


class RowRun:
    """One row in a folder of its own."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.row, self.args = ROWS[name], args
        self.folder = args.out.resolve() / name
        self.output = self.folder / "output"
        place = args.checkout.resolve() / "recipes" / self.row.recipe
        self.script = place / self.row.script
        self.yaml = place / "hparams" / self.row.yaml
        self.text = self.yaml.read_text(encoding="utf-8")

    def has(self, key: str) -> bool:
        """Whether the recipe's YAML has a key."""
        return re.search(rf"^{key}:", self.text, re.MULTILINE) is not None

    def prepare(self) -> None:
        """Make the corpus, the models and the command line, once."""
        known = self.folder / "overrides.json"
        if self.args.fresh or not known.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            overrides = self._overrides()
            known.write_text(json.dumps(overrides, indent=1))
        self.overrides = json.loads(known.read_text())
        shutil.rmtree(self.output / "quantized", ignore_errors=True)
        self._write_yaml()

    def _overrides(self) -> dict[str, Any]:
        """Make the corpus and the models; returns the recipe's overrides."""
        if self.args.splits:
            folders = zip(
                ("train", "valid", "test"), self.args.splits, strict=True
            )
            splits = {name: corpora.read(folder) for name, folder in folders}
        else:
            sizes = {"train": 8, "valid": 4, "test": 6}
            splits = corpora.read_splits(self.args.speech, sizes)
        overrides = {"data_folder": str(self.folder / "data")}
        overrides["output_folder"] = str(self.output)
        data = Path(overrides["data_folder"])
        overrides |= self.row.imitate(data, splits, str(self.output))
        texts = [
            self.row.texts(r.text) for rows in splits.values() for r in rows
        ]
        labels = self._labels(texts)
        sizes = scaled(self.row.sizes, self.args.scale)
        overrides |= {"output_neurons": labels, **COMMON, **sizes}
        overrides |= yaml.safe_load(self.args.set)
        overrides = json.loads(
            json.dumps(overrides)
            .replace("{out}", str(self.output))
            .replace('"labels"', str(labels))
        )
        overrides = {k: v for k, v in overrides.items() if self.has(k)}
        for key, family in self.row.models.items():
            overrides |= self._model(key, family, texts, overrides)
        return overrides

    def _labels(self, texts: list[str]) -> int:
        count = len({c for text in texts for c in text})
        if self.row.labels == "bert":
            return models.bert_tokenizer(self.folder / "bert", texts)
        special = {"chars": 1, "media": 2, "marked": 3}
        if self.row.labels in special:
            return count + special[self.row.labels]
        return models.vocabulary_size(texts)

    def _model(
        self, key: str, family: str, texts: list[str], overrides: Mapping
    ) -> dict[str, Any]:
        """Make a model; returns the override that names it."""
        folder = self.folder / family.lower()
        if family == "bert":
            return {key: {"pretrained_model_name_or_path": str(folder)}}
        if family == "Whisper":
            models.whisper_folder(folder, self.args.scale)
        elif family == "crdnn":
            models.crdnn_folder(folder, texts)
        elif family in ("lm", "tokenizer", "slurp"):
            path = folder / "tokenizer.ckpt"
            named = re.search(r"^bos_index: 1\b", self.text, re.MULTILINE)
            ids = {"bos_id": 1, "eos_id": 2} if named else {}
            models.sentencepiece(path, texts, **ids)
            if family == "tokenizer":
                return {key: str(path)}
            # As SLURP's recipe names it.
            shutil.copy(path, folder / "tokenizer_58_unigram.model")
            if family == "lm":
                path = folder / "lm.ckpt"
                models.language_model(self.yaml, overrides, path)
        else:
            models.ssl_folder(folder, family, self.args.scale)
        return {key: str(folder)}

    def _write_yaml(self) -> None:
        """A copy of the recipe's YAML with the block at its end."""
        block = {"target": self.row.target, **_BLOCK}
        block |= yaml.safe_load(self.args.block)
        backends = self.args.backends.split(",")
        if len(backends) == 1:
            block["backend"] = backends[0]
        else:
            rows = [{"name": name, "backend": name} for name in backends]
            block["variants"] = rows
        lines = yaml.safe_dump(block, sort_keys=False).splitlines()
        text = "quantize: !apply:speechbrain_stablequant.register\n"
        text += "".join(f"    {line}\n" for line in lines)
        (self.folder / "train.yaml").write_text(f"{self.text}\n\n{text}")

    def command(self) -> list[str]:
        """The command line of the recipe."""
        values = {
            key: value
            if isinstance(value, str) and "=" not in value
            # It reads `=` as a space.
            else json.dumps(value).replace("=", "\\u003d")
            for key, value in self.overrides.items()
        }
        return [
            str(self.script),
            str(self.folder / "train.yaml"),
            "--device=cpu",
            *(f"--{key}={value}" for key, value in values.items()),
        ]

    def start(self, target: Callable, log: str) -> tuple[int, str]:
        """Call something in a process of its own, which has all imports;
        returns its exit status and what it wrote."""
        file, limit = self.folder / log, self.args.limit

        def call() -> None:
            with open(file, "wb", buffering=0) as out:
                for stream in (1, 2):
                    os.dup2(out.fileno(), stream)
            sys.stdout.reconfigure(line_buffering=True)
            os.chdir(self.folder)
            # Where a process is that takes too long.
            faulthandler.dump_traceback_later(limit - 10)
            target()

        process = multiprocessing.get_context("fork").Process(target=call)
        process.start()
        process.join(limit)
        text = file.read_text(errors="replace")
        if process.is_alive():
            process.kill()
            text += f"\nTimeoutExpired: longer than {limit} s"
        process.join()
        return process.exitcode, text

    def recipe(self) -> None:
        """Run the recipe's script, as a command line does."""
        sys.argv = self.command()
        sys.path[:0] = [str(self.script.parent), str(ROOT)]
        runpy.run_path(str(self.script), run_name="__main__")

    def run(self) -> dict[str, Any]:
        """Run the row; returns what the table says of it."""
        self.prepare()
        before = os.times()
        status, text = self.start(self.recipe, "log.txt")
        after = os.times()
        row = {
            "evaluated": False,
            "folder": False,
            "said": last_line(text) if status else "",
            "seconds": round(after.elapsed - before.elapsed, 1),
            "cpu_seconds": round(after.children_user - before.children_user, 1),
            "note": self.row.note,
            "backends": {},
        }
        for name in self.args.backends.split(","):
            quantized = self.output / "quantized"
            if "," in self.args.backends:
                quantized /= name
            if (quantized / "report.json").exists():
                row["backends"][name] = self.result(quantized)
        made = row["backends"].values()
        row["evaluated"] = not status and bool(made)
        row["folder"] = row["evaluated"] and all(r["folder"] for r in made)
        return row

    def result(self, folder: Path) -> dict[str, Any]:
        """What a report says, and whether its folder says the same."""
        report = json.loads((folder / "report.json").read_text())
        rates = next(iter(report["test"].values()))
        rtf, gain = report["rtf"], report["speedup"]
        row = {
            "backend": report["backend"],
            "WER": [rates[k]["WER"] for k in ("float", "quantized")],
            "size": report["size_mb"]["quantized"] / report["size_mb"]["float"],
            "time": rtf["quantized"] / rtf["float"] if rtf["float"] else None,
            # Fewer turns have no interval.
            "time_ci": gain and [1 / x for x in reversed(gain["ratio_ci"])],
            "folder": (folder / "model/hyperparams.yaml").exists(),
            "share": {
                kind: shares(report["account"][kind])
                for kind in ("parameters", "products")
            },
            "warnings": report["warnings"],
        }
        if row["folder"]:
            (name,) = (x for x in report["files"] if x.startswith("recognizer"))
            # "recognizer, for EncoderASR"
            row |= self.check(folder, name.split()[-1])
        return row

    def check(self, folder: Path, name: str) -> dict[str, Any]:
        """Load the folder in SpeechBrain's class and compare transcripts."""
        manifest = self.output / self.row.manifest
        results = folder / "checked.json"
        paths = (folder, manifest, results, self.folder / "data")

        def compare() -> None:
            sys.path.insert(0, str(ROOT))
            check.main(name, *paths)

        status, text = self.start(compare, f"check_{folder.name}.txt")
        if status:
            return {"equal": False, "check_said": last_line(text)}
        return json.loads(results.read_text())


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Percentages that are quantized, and stored as integers alone."""
    whole = sum(counts.values()) or 1
    keys = ("quantized", "weight_only")
    return {key: 100 * counts[key] / whole for key in keys}


def last_line(text: str) -> str:
    """The error that a process ended with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kinds = r"stablequant: |[\w.]*(Error|Exit|Expired)\b"
    named = [x for x in lines if re.match(kinds, x)]
    return (named or lines or [""])[-1]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in Markdown; of several backends the last one."""
    lines = [
        "| recipe | evaluated | folder | equal | parameters | products | size "
        "| time | says |",
        "|---|---|---|---|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        last = next(reversed(row["backends"].values()), {})
        said = row["said"] or last.get("check_said", "")
        if not said and last and not row["folder"]:
            said = next((w for w in last["warnings"] if "folder" in w), "")
        equal = {True: "yes", False: "no"}.get(last.get("equal"), "-")
        figures = ["-"] * 4
        if last:
            figures = [
                f"{part['quantized']:.0f} + {part['weight_only']:.0f} %"
                for part in last["share"].values()
            ]
            figures += [f"{last['size']:.2f}", _time(last)]
        yes = ["yes" if row[key] else "no" for key in ("evaluated", "folder")]
        said = said.replace("|", "\\|")[:300]
        lines.append(f"| {' | '.join([name, *yes, equal, *figures, said])} |")
    return "\n".join(lines) + "\n"


def _time(row: Mapping[str, Any]) -> str:
    """Time against float, with its 95 % interval."""
    ends = row.get("time_ci")
    more = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"{row['time']:.2f}{more}"


def main() -> None:
    """Runs the rows one after the other."""
    args = parse_arguments()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not args.installed:
        sys.path.insert(0, str(args.checkout.resolve()))
    for name in _IMPORTS:
        importlib.import_module(name)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "rows.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for name in args.rows:
        try:
            rows[name] = RowRun(name, args).run()
        except Exception as error:
            said = f"not prepared: {type(error).__name__}: {error}"
            blank = {"evaluated": False, "folder": False, "backends": {}}
            rows[name] = {**blank, "said": said}
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
        ordered = {key: rows[key] for key in ROWS if key in rows}
        file.write_text(json.dumps(ordered, indent=1))
        (args.out / "rows.md").write_text(table(ordered))


if __name__ == "__main__":
    main()
