"""The commands, their options and exit codes.

What they need is imported when they run: ``--help`` takes no torch.
"""

import fnmatch
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML, YAMLError

from .. import __version__
from ..utils.lock import FolderInUse
from ..utils.typed import one_line
from .recipe import INTERRUPTED, ending_while_importing, start

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_PATH = click.Path(exists=True, path_type=Path)
_BACKENDS = ("auto", "openvino", "torch_int8", "onnx", "triton", "torch")

_ENGINES = (
    "onnxruntime",
    "openvino",
    "sherpa-onnx",
    "tensorrt",
    "transformers.js",
)

_TRUST = click.option(
    "--trust-source",
    is_flag=True,
    help="Let SpeechBrain execute hyperparams.yaml, which models other than "
    "wav2vec 2.0 and HuBERT with CTC need.",
)

_METHODS = (
    *("stablequant", "max", "percentile", "entropy", "mse", "adaround"),
    *("stablequant_plus", "qat"),
)

_EXITS = """\b
Exit codes: 0 done; 1 refused or failed, with one line on the standard error
(a recipe's is the last one); 2 wrong usage; 130 interrupted.
Completion: eval "$(_STABLEQUANT_COMPLETE=bash_source stablequant)", or
zsh_source, fish_source."""


@click.group(
    epilog=_EXITS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="stablequant")
def app() -> None:
    """Quantize speech recognizers of SpeechBrain, and use them."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command and exit; errors are one line."""
    if not sys.warnoptions:
        # Of libraries, for those who write code with them.
        warnings.simplefilter("ignore")
    try:
        with ending_while_importing():
            code = app.main(args, "stablequant", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        # A run says how to continue, and marks the interruption.
        if not getattr(error.__cause__ or error, "is_explained", False):
            _say("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        # Of `stablequant ... | head`: Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (ImportError, OSError, ValueError, FolderInUse) as error:
        _say(one_line(error, 600))
        code = 1
    sys.exit(code or 0)


def _say(line: str) -> None:
    click.echo(f"stablequant: {line}", err=True)


# -- quantize ------------------------------------------------------------------


class _RecipeOrSource(click.Command):
    """Leaves the options of a recipe's script to it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].endswith(".py"):
            ctx.params["recipe"] = args
            return []
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["SCRIPT HPARAMS [RECIPE OPTIONS] | SOURCE MANIFEST OUT ..."]


@app.command(cls=_RecipeOrSource)
@click.argument("source")
@click.argument("manifest", type=_PATH)
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--quantize",
    "block",
    default="{}",
    help='Keys of the block, as in "{method: mse, weight_bits: 6}".',
)
@click.option(
    "--test-manifest",
    type=_PATH,
    help="Utterances to evaluate; by default half of MANIFEST.",
)
@click.option("--data-root", type=_FOLDER, help="Where paths begin.")
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--trust-source", is_flag=True, help="Let SOURCE execute its own code."
)
def quantize(
    recipe: Sequence[str] = (),
    block: str = "{}",
    device: str = "cpu",
    **options: Any,
) -> None:
    """Quantize a recipe's recognizer, or a pretrained one.

    SCRIPT HPARAMS runs a recipe whose YAML has a `quantize:` block, with the
    recipe's own options. SOURCE is a model on the HuggingFace Hub or a folder
    in its layout, MANIFEST audio with transcripts (SpeechBrain's CSV or JSON,
    or a folder in LibriSpeech's layout), OUT the folder to write.

    \b
    stablequant quantize train.py hparams/quant.yaml --data_folder LibriSpeech
    stablequant quantize speechbrain/asr-wav2vec2-librispeech dev.csv out
    """
    if recipe:
        start(recipe)
        return
    from .. import quantize_pretrained
    from ..brain.block import read_block

    given = _mapping(block)
    read_block(given)  # What has the name of another argument is no key.
    made = quantize_pretrained(**options, run_opts={"device": device}, **given)
    found = made if isinstance(made, dict) else {"": made}
    for name, row in found.items():
        click.echo(
            f"{name}{': ' * bool(name)}WER {row.float_wer:.2f} -> "
            f"{row.quantized_wer:.2f} %; the model: {row.model}"
        )


def _mapping(text: str) -> dict[str, Any]:
    try:
        block = YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ValueError(
            f"--quantize: {text} is no YAML ({one_line(error)}); write it as "
            'in "{weight_bits: 6}"'
        ) from error
    if not isinstance(block, dict):
        raise ValueError(
            f"--quantize: is no mapping: {text}; write it as in "
            '"{weight_bits: 6}"'
        )
    return block


def _methods(context: Any, parameter: Any, begun: str) -> list[str]:
    """Completions of a method's name."""
    return [name for name in _METHODS if name.startswith(begun)]


@app.command()
@click.argument("name", required=False, shell_complete=_methods)
def keys(name: str | None) -> None:
    """Show the keys of the block `quantize:`.

    Each with its type, default and meaning. NAME is a method (the keys that it
    reads), a preset (what it sets, and the keys of its method), a block or a
    key. Without NAME it is the Markdown of docs/keys.md.

    \b
    stablequant keys stablequant_plus
    stablequant keys search.threshold
    """
    from ..brain.keys import keys_text

    click.echo(keys_text(name))


# -- what was decided ----------------------------------------------------------


@app.command()
@click.argument("path", type=_PATH, metavar="FOLDER|PLAN")
@click.option(
    "--layer",
    "pattern",
    help="Only layers, or all of a unit, of this name: *.q_proj",
)
def inspect(path: Path, pattern: str | None) -> None:
    """Show what was decided for each unit, or for layers and why.

    \b
    stablequant inspect results/quant/1986/quantized
    stablequant inspect plan.json --layer '*.layers.3.*'
    """
    from . import plans

    plan = plans.load(path)
    if pattern is None:
        click.echo(plans.units(plan))
        return
    names = [
        layer.name
        for layer in plan.layers
        if any(fnmatch.fnmatch(x, pattern) for x in (layer.name, layer.unit))
    ]
    if not names:
        first = plan.layers[0]
        raise ValueError(
            f"--layer {pattern}: no layer or unit of {path} has such a name; "
            f"the first layer is {first.name} of unit {first.unit}, and "
            f"*{pattern}* finds parts of names"
        )
    click.echo(plans.layers(plan, names))


@app.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
def compare(first: Path, second: Path) -> None:
    """Show what differs between two plans or reports.

    FIRST and SECOND are two quantized folders, plan.json, or report.json.

    \b
    stablequant compare results/a/quantized results/b/quantized
    """
    from . import plans

    click.echo(plans.compared(first, second))


# -- what it does --------------------------------------------------------------


@app.command()
@click.argument("folder", type=_FOLDER)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--format",
    "form",
    type=click.Choice(["txt", "srt", "json"]),
    default="txt",
    show_default=True,
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for one file each; by default they are printed.",
)
@click.option(
    "--backend", type=click.Choice(_BACKENDS), default="auto", show_default=True
)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--window",
    type=click.IntRange(5),
    default=16,
    show_default=True,
    help="Seconds that are computed at once; longer files are joined.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Windows that are computed at once; more pay on a GPU.",
)
@_TRUST
def transcribe(
    folder: Path,
    files: Sequence[str],
    form: str,
    output: Path | None,
    backend: str,
    device: str,
    window: int,
    batch: int,
    trust_source: bool,
) -> int:
    """Transcribe audio files with a quantized folder.

    wav2vec 2.0 and HuBERT with CTC read files of any length; other models read
    a file at once, and give text alone. Nothing in FOLDER is executed without
    --trust-source. A file that cannot be read is one line, and the others are
    transcribed. With --output, words are in NAME.txt.part (or srt, json) until
    it is finished.

    \b
    stablequant transcribe results/quant/1986/quantized a.flac b.wav
    stablequant transcribe quantized *.wav --format json --output texts
    """
    from ..transcribe.load import check_backend, leave_out_stated, load
    from . import transcripts

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        transcripts.check_names(files)
    recognizer = load(folder, backend, device, trust_source=trust_source)
    transcripts.check_form(recognizer, form)
    check_backend(recognizer)
    # It would come with every call.
    leave_out_stated(recognizer)
    failed, progress = 0, sys.stderr.isatty()
    for file in files:
        try:
            words = transcripts.words_of(
                recognizer, file, window, batch, progress
            )
            if output is None:
                title = file if len(files) > 1 else None
                transcripts.show(words, file, form, title)
            else:
                transcripts.save(words, file, form, output)
        except ValueError as error:
            _say(one_line(error, 400))
            failed = 1
    return failed


@app.command()
@click.argument("folder", type=_FOLDER)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--target", type=click.Choice(_ENGINES), required=True, help="The engine."
)
@click.option(
    "--weight-range",
    type=click.Choice(["7", "8"]),
    help="Bits of weights; 8 saturates on x86 CPUs without VNNI.  [default: 7, "
    "for tensorrt 8]",
)
def export(
    folder: Path, out: Path, target: str, weight_range: str | None
) -> None:
    """Write the folder that another engine loads, without torch there.

    Its README.md shows how it is used.

    \b
    stablequant export results/quant/1986/quantized phone --target sherpa-onnx
    """
    from ..export import export_for

    made = export_for(folder, out, target, weight_range and int(weight_range))
    size = sum(x.stat().st_size for x in made.rglob("*") if x.is_file())
    click.echo(f"{made}: {size / 1e6:.1f} MB, see {made / 'README.md'}")


@app.command()
@click.argument("folder", type=_FOLDER)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 60),
    default=10.0,
    show_default=True,
    help="Of audio in one pass.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=7,
    show_default=True,
    help="Passes that are timed; the runtimes take turns.",
)
@_TRUST
def benchmark(
    folder: Path, seconds: float, rounds: int, trust_source: bool
) -> None:
    """Time a folder on this machine by each runtime that it has.

    \b
    stablequant benchmark results/quant/1986/quantized --seconds 30
    """
    from . import timing

    click.echo(timing.table(folder, seconds, rounds, trust_source))
