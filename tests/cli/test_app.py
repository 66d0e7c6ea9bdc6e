"""The ``stablequant`` command, on a tiny folder."""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch
from click.testing import CliRunner
from quantized_folder import SETTINGS, write

from speechbrain_stablequant.cli import plans, transcripts
from speechbrain_stablequant.cli.app import app, main
from speechbrain_stablequant.core.plan import UnitPlan
from speechbrain_stablequant.export import ENGINES
from speechbrain_stablequant.methods.registry import METHODS
from speechbrain_stablequant.runtimes import cpu
from speechbrain_stablequant.runtimes.registry import RUNTIMES
from speechbrain_stablequant.transcribe import load as load_module
from speechbrain_stablequant.transcribe.load import load
from speechbrain_stablequant.utils.interrupts import explained
from speechbrain_stablequant.utils.lock import FolderInUse


@pytest.fixture(scope="module")
def folder(make_tiny_modules, tmp_path_factory) -> Path:
    torch.manual_seed(7)
    place = tmp_path_factory.mktemp("cli") / "quantized"
    write(place, make_tiny_modules("wav2vec2-large"), encoder=SETTINGS)
    return place


@pytest.fixture(scope="module")
def audio(folder) -> Path:
    """Noise of 21 seconds, and of one."""
    for name, seconds in (("long", 21), ("short", 1)):
        torch.manual_seed(seconds)
        wave = 0.1 * torch.randn(seconds * 16000)
        soundfile.write(folder.parent / f"{name}.wav", wave.numpy(), 16000)
    return folder.parent


def run(capsys, *args: object) -> tuple[int, str, str]:
    """Exit status, standard output and error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    return stopped.value.code, *capsys.readouterr()


def test_help_shows_an_example_of_each_command():
    for name in app.commands:
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0
        assert f"  stablequant {name} " in shown.output


def test_help_imports_little():
    code = (
        "import sys; from speechbrain_stablequant.cli import app\n"
        "try: app.main(['--help'])\n"
        "finally: assert not {'torch', 'speechbrain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- transcribe ----------------------------------------------------------------


def test_transcribe(folder, audio, capsys):
    expected = load(folder, "torch").transcribe_file(audio / "short.wav")
    code, out, _ = run(
        capsys,
        *("transcribe", folder, audio / "short.wav", "--backend", "torch"),
    )
    assert code == 0
    assert out.split() == expected.split()


@pytest.mark.parametrize("probed", [True, False])
def test_no_line_about_a_cpu_whose_answer_the_folder_has(
    folder, audio, capsys, caplog, monkeypatch, probed
):
    """Each call is a process, and would say it again."""
    caplog.set_level("WARNING", cpu.logger.name)  # as it was, at the end
    recognizer = load(folder, "torch")
    layers = {n: x.loaded() for n, x in recognizer.model.integers().items()}
    if not probed:
        recognizer.model.probe = None
    monkeypatch.setattr(load_module, "load", lambda *_, **__: recognizer)
    arguments = (folder, audio / "short.wav", "--backend", "torch")
    assert run(capsys, "transcribe", *arguments)[0] == 0
    cpu._say_narrowed.cache_clear()
    cpu.executed_integers(layers, cpu.CpuClass("avx2", False))
    assert ("has no VNNI" in caplog.text) == (not probed)


def test_files_are_written_and_a_wrong_one_is_a_line(
    folder, audio, tmp_path, capsys
):
    (audio / "text.wav").write_text("no audio")
    files = [audio / f"{name}.wav" for name in ("text", "long", "short")]
    out = tmp_path / "out"
    code, _, err = run(
        capsys,
        *("transcribe", folder, *files, "--backend", "torch"),
        *("--format", "json", "--output", out),
    )
    assert code == 1
    (line,) = [x for x in err.splitlines() if x.startswith("stablequant")]
    assert f"{files[0]}: cannot be read as audio" in line
    assert {p.name for p in out.iterdir()} == {"long.json", "short.json"}
    row = json.loads((out / "long.json").read_text("utf-8"))
    assert row["file"] == str(files[1])
    assert row["text"] == " ".join(word["text"] for word in row["words"])
    assert row["words"][-1]["end"] <= 21


def test_subtitles(folder, audio, capsys):
    _, out, _ = run(
        capsys,
        *("transcribe", folder, audio / "long.wav", "--backend", "torch"),
        *("--format", "srt"),
    )
    first, second = out.split("\n\n")[0].splitlines()[:2]
    assert first == "1"
    assert second.startswith("00:00:0")
    assert " --> 00:00:" in second


def test_silence_has_no_subtitles(tmp_path, capsys):
    transcripts.show([], "a.wav", "srt", None)
    transcripts.save([], "a.wav", "srt", tmp_path)
    assert (tmp_path / "a.srt").read_text() == capsys.readouterr().out == ""


def test_what_was_transcribed_is_there_after_an_interrupt(
    folder, audio, tmp_path, monkeypatch, capsys
):
    from speechbrain_stablequant.transcribe.long import Word

    def words(*args, **options):
        yield Word("ONE", 0.0, 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "speechbrain_stablequant.transcribe.load.words_of_file", words
    )
    command = ("transcribe", folder, audio / "short.wav", "--output", tmp_path)
    code, _, err = run(capsys, *command)
    assert code == 130
    assert err.splitlines()[-1] == "stablequant: interrupted"
    assert (tmp_path / "short.txt.part").read_text("utf-8") == "ONE"


def test_a_file_that_cannot_be_read_prints_nothing(folder, audio, capsys):
    missing = audio / "missing.wav"
    command = ("transcribe", folder, missing, audio / "short.wav")
    code, out, err = run(capsys, *command, "--backend", "torch")
    assert code == 1
    assert f"{missing}: there is no such audio file" in err
    assert str(missing) not in out
    assert out.startswith(f"{audio / 'short.wav'}\t")
    code, _, err = run(capsys, "transcribe", folder, audio)
    assert f"{audio}: is a folder; give its audio files" in err
    empty = audio / "empty.wav"
    empty.touch()
    code, _, err = run(capsys, "transcribe", folder, empty)
    assert (code, err) == (1, f"stablequant: {empty}: the file is empty\n")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "holds no quantized recognizer; give the folder `quantized`"),
        ({"plan.json": "{}"}, "holds no quantized recognizer; the report of"),
        (
            {"hyperparams.yaml": "modules: {}\n"},
            "it is of a float model, which `stablequant quantize` takes",
        ),
    ],
)
def test_a_folder_without_a_quantized_model(
    files, line, audio, tmp_path, capsys
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, err = run(capsys, "transcribe", tmp_path, audio / "short.wav")
    assert code == 1
    assert line in err and len(err.splitlines()) == 1


def test_a_backend_that_cannot_run_is_said_before_any_file(
    folder, audio, monkeypatch, capsys
):
    absent = replace(RUNTIMES["openvino"], needs=("package_that_is_absent",))
    monkeypatch.setitem(RUNTIMES, "openvino", absent)
    files = (audio / "short.wav", audio / "long.wav")
    options = ("--backend", "openvino")
    code, out, err = run(capsys, "transcribe", folder, *files, *options)
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(
        "stablequant: backend: openvino cannot run: package "
        "'package_that_is_absent' is not installed"
    )


def test_two_files_of_one_name(folder, tmp_path, capsys):
    code, _, err = run(
        capsys,
        *("transcribe", folder, "a/x.wav", "b/x.wav", "--output", tmp_path),
    )
    assert code == 1
    assert "a/x.wav and b/x.wav have the same name" in err


# -- inspect and compare -------------------------------------------------------


def test_inspect(folder, capsys):
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    rows = [line.split() for line in out.splitlines()]
    counts = Counter(layer["unit"] for layer in plan["layers"])
    assert {row[0]: int(row[1]) for row in rows[2 : 2 + len(counts)]} == counts
    name = plan["layers"][0]["name"]
    code, out, _ = run(capsys, "inspect", folder, "--layer", name)
    assert out.startswith(f"{name}\n")
    assert plan["layers"][0]["reason"] in out


def test_why_a_percentile_was_chosen(folder):
    """The rates of all, what they are compared with, and which are bounds."""
    plan = plans.load(folder)
    name, unit = plan.layers[0].name, plan.layers[0].unit
    curve = [
        {"cutoff": 100.0, "wer": 6.81, "secondary": 0.25, "complete": True},
        {"cutoff": 99.9, "wer": 6.81, "secondary": 0.125, "complete": True},
        {"cutoff": 99.5, "wer": 6.66, "secondary": 0.1, "complete": False},
    ]
    search = {"baseline_wer": 6.5, "selection": "threshold", "threshold": 0.25}

    def shown(cutoff: float) -> list[str]:
        units = [UnitPlan(unit, 6.81, 0.31, None, True, cutoff, curve)]
        text = plans.layers(replace(plan, units=units, search=search), [name])
        return [row.strip() for row in text.splitlines() if row]

    rows = shown(100.0)
    assert "clipping percentile  100 %" in rows
    assert rows[-5:] == [
        f"percentiles tried for {unit}; units searched before it are quantized "
        "as decided, the rest of the model is float:",
        "100 %: WER 6.81, loss 0.25, chosen",
        "99.9 %: WER 6.81, loss 0.125",
        "99.5 %: WER at least 6.66, stopped there",
        "float: WER 6.50 on the search set; searched: units above +0.25 alone",
    ]
    costs = "not clipping costs {} points of WER"
    assert shown(99.9)[-2] == "chosen by the lower loss: " + costs.format(
        "+0.00"
    )
    curve[0]["wer"] = 7.01
    assert shown(99.9)[-2] == costs.format("+0.20")
    search["rule"] = "divergence"
    curve[2] |= {"wer": None, "complete": True}
    assert shown(99.9)[-4:-1] == [
        "99.9 %: WER 6.81, divergence 0.125, chosen",
        "99.5 %: divergence 0.1",
        "chosen by the least divergence; " + costs.format("+0.20"),
    ]


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"beyond": 0.0}, "|input| <= 3, which cuts nothing"),
        (
            {"beyond": 2.5e-5, "observed_max": 9.0},
            "|input| <= 3, which cuts 0.0025 % of the inputs",
        ),
        ({"observed_max": 9.0}, "|input| <= 3, which cuts the largest inputs"),
        (
            {"beyond": 0.01, "offset": 2.75},
            "-0.25 <= input <= 5.75, which cuts 1 % of the inputs",
        ),
    ],
)
def test_what_a_range_cuts(folder, changes, line):
    """At 100 %, too: a scale of least squared error cuts by itself."""
    plan = plans.load(folder)
    first = plan.layers[0]
    offset = changes.pop("offset", 0.0)
    quant = replace(first.quant, activation_offset=offset)
    changed = replace(first, quant=quant, cutoff=100.0, **changes)
    changed = replace(plan, layers=[changed])
    rows = plans.layers(changed, [first.name]).splitlines()
    assert f"  range                {line}" in rows
    row = plans.units(changed).splitlines()[2]
    cut = {0.0: "0 %", None: ""}.get(changed.layers[0].beyond)
    if cut is None:
        cut = line.rpartition("cuts ")[2].removesuffix(" of the inputs")
    assert row.split("100 %")[1].split() == [*cut.split(), "no"]


def test_a_layer_of_weights_alone_has_no_percentile(folder):
    plan = plans.load(folder)
    first = next(row for row in plan.layers if row.quant)
    alone = replace(first, quant=replace(first.quant, activation_bits=16))
    changed = replace(plan, layers=[alone])
    row = plans.units(changed).splitlines()[2]
    assert row.split() == [first.unit, "1", "W8", "no"]
    text = plans.layers(changed, [first.name])
    assert "W8\n" in text and "percentile" not in text and "range" not in text


def test_a_layer_that_is_not_there(folder, capsys):
    code, _, err = run(capsys, "inspect", folder, "--layer", "encoder.9")
    assert code == 1
    assert "--layer encoder.9: no layer or unit of" in err


def test_layers_of_a_unit(folder, capsys):
    rows = json.loads((folder / "plan.json").read_text("utf-8"))["layers"]
    unit = rows[-1]["unit"]
    expected = [row["name"] for row in rows if row["unit"] == unit]
    for pattern in (unit, f"{unit[:-1]}[{unit[-1]}]"):
        _, out, _ = run(capsys, "inspect", folder, "--layer", pattern)
        names = [block.splitlines()[0] for block in out.split("\n\n")]
        assert names == expected


def test_what_belongs_to_a_unit_is_shown_once(folder):
    plan = plans.load(folder)
    names = list(dict.fromkeys(row.unit for row in plan.layers))[-2:]
    curve = [{"cutoff": 100.0, "wer": 6.5, "secondary": None}]
    units = [UnitPlan(x, 6.5, 0.3, None, True, 100.0, curve) for x in names]
    plan = replace(plan, units=units, search={"baseline_wer": 6.25})
    layers = [row.name for row in plan.layers if row.unit in names]
    assert len(layers) > len(names)
    blocks = plans.layers(plan, layers).split("\n\n")
    assert len(blocks) == len(layers) + len(names) + 1
    heads = [x.split(";")[0] for x in blocks if x.endswith(", chosen")]
    assert heads == [f"percentiles tried for {name}" for name in names]
    assert blocks[-1] == "float: WER 6.25 on the search set"


def test_inspect_says_what_is_no_quantized_folder(folder, tmp_path, capsys):
    code, out, err = run(capsys, "inspect", tmp_path)
    assert (code, out) == (1, "")
    line = f"stablequant: {tmp_path}: holds no quantized recognizer; give the"
    assert err == f"{line} folder `quantized` of a run, or its plan.json\n"
    _, _, err = run(capsys, "inspect", folder.parent)
    assert f"give the folder {folder} of a run" in err


def test_compare(folder, tmp_path, capsys):
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    code, out, _ = run(capsys, "compare", folder, folder / "plan.json")
    assert (code, out.splitlines()[0]) == (
        0,
        f"0 of {len(plan['layers'])} layers differ",
    )
    plan["layers"][1]["quant"]["activation_bits"] = 6
    changed = tmp_path / "plan.json"
    changed.write_text(json.dumps(plan), "utf-8")
    _, out, _ = run(capsys, "compare", folder, changed)
    assert f"1 of {len(plan['layers'])} layers differ" in out
    assert plan["layers"][1]["name"] in out
    assert "W8A8" in out and "W8A6" in out
    code, _, err = run(capsys, "compare", folder, tmp_path)
    assert code == 0 and not err
    code, _, err = run(capsys, "compare", folder, __file__)
    assert code == 1
    assert "give two quantized folders" in err


def test_compared_reports(tmp_path, capsys):
    """The gain of each over float, which is measured in turns; times of two
    runs do not compare."""
    rates = {"float": {"WER": 5.0}, "quantized": {"WER": 5.25}}
    found = {"ratio": 1.6, "ratio_ci": [1.3, 1.9], "batches": 10}
    first = {
        "title": "W8A8 max",
        "backend": "openvino",
        "size_mb": {"float": 14.0, "quantized": 3.5},
        "rtf": {"float": 0.016, "quantized": 0.01},
        "speedup": found,
        "test": {"clean": rates},
    }
    none = dict.fromkeys(("float", "quantized"))
    second = {**first, "backend": "simulated", "rtf": none, "speedup": None}
    second["size_mb"] = {"float": 5000.0, "quantized": 1234.5}
    for name, report in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        text = json.dumps(report)
        (tmp_path / name / "report.json").write_text(text, "utf-8")
    code, out, err = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["speed", "1.60x", "faster", "(1.30x", "to", "1.90x)", "n/a"] in rows
    assert not any("factor" in row for row in rows)
    assert ["size,", "MB", "3.5", "1234.5"] in rows
    assert ["clean,", "quantized", "WER", "%", "5.25", "5.25"] in rows


# -- quantize, export, benchmark -----------------------------------------------


def test_a_recipe_is_run_as_by_python(tmp_path):
    script, block = tmp_path / "train.py", tmp_path / "quant.yaml"
    script.write_text(
        "import sys; print([__file__, *sys.argv[1:]]); sys.exit(5)"
    )
    block.write_text("quantize: !apply:speechbrain_stablequant.register\n")
    command = [sys.executable, "-m", "speechbrain_stablequant.cli", "quantize"]
    options = ["--device", "cpu", "--quantize", "{weight_bits: 6}"]
    done = subprocess.run(
        [*command, script.name, block.name, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5, done.stderr
    assert done.stdout.strip() == str([str(script), block.name, *options])


@pytest.mark.skipif(sys.platform == "win32", reason="stays a process there")
def test_torch_is_left_to_the_recipe(tmp_path):
    (tmp_path / "train.py").touch()
    (tmp_path / "quant.yaml").write_text("quantize: {}")
    code = (
        "import os, sys; from speechbrain_stablequant.cli.app import main\n"
        "heavy = {'torch', 'speechbrain'}\n"
        "os.execv = lambda *_: sys.exit(7 + len(heavy & set(sys.modules)))\n"
        "main(['quantize', 'train.py', 'quant.yaml'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, timeout=60)
    assert done.returncode == 7


BLOCK = (
    "model: !apply:os.mkdir [model]\n"
    "quantize: !apply:speechbrain_stablequant.register\n    {}\n"
)
LOADS = """
import sys
import beside
from hyperpyyaml import load_hyperpyyaml

with open(sys.argv[1]) as file:
    load_hyperpyyaml(file)
raise ValueError("of the recipe")
"""


@pytest.mark.parametrize(
    "key, line, traceback",
    [
        (
            "activation_bit: 8",
            "stablequant: quantize.activation_bit: unknown key; did you mean "
            "'activation_bits'?",
            False,
        ),
        ("activation_bits: 8", "ValueError: of the recipe", True),
    ],
)
def test_a_wrong_block_is_one_line(tmp_path, key, line, traceback):
    """And a recipe's own errors are as they were."""
    (tmp_path / "train.py").write_text(LOADS)
    (tmp_path / "beside.py").touch()
    (tmp_path / "quant.yaml").write_text(BLOCK.format(key))
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "speechbrain_stablequant.cli", "quantize"]
    files = [str(tmp_path / name) for name in ("train.py", "quant.yaml")]
    done = subprocess.run(
        [*command, *files],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == line
    assert ("Traceback" in done.stderr) == traceback
    # No model is made for a block that is wrong, wherever it stands.
    assert (work / "model").exists() == traceback


LOAD = """
import os, signal, time

def load():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)

"""
RUN = """from speechbrain_stablequant.utils.interrupts import explained
with explained("go on", True):
    load()"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(
    "code, line",
    [
        ("load()", "stablequant: interrupted"),
        (RUN, "quantize: interrupted; go on"),
        ("try: load()\nexcept KeyboardInterrupt: raise SystemExit(130)", ""),
        ("import swallows", "stablequant: interrupted"),
    ],
)
def test_an_interrupted_recipe(tmp_path, code, line):
    """While it loads weights, in its run, one that handles it itself, and
    while a module is imported, which may catch everything."""
    (tmp_path / "train.py").write_text(LOAD + code)
    swallows = "try: load()\nexcept BaseException: pass"
    (tmp_path / "swallows.py").write_text(LOAD + swallows)
    (tmp_path / "quant.yaml").write_text(BLOCK.format(""))
    command = [sys.executable, "-m", "speechbrain_stablequant.cli", "quantize"]
    done = subprocess.run(
        [*command, "train.py", "quant.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        # What a shell starts in the background ignores it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 130
    assert done.stderr.strip() == line


@pytest.mark.parametrize("explains", [True, False])
def test_an_interruption_is_said_once(explains, tmp_path, monkeypatch, capsys):
    import speechbrain_stablequant

    def stand_in(**options):
        with explained("go on", False) if explains else nullcontext():
            raise KeyboardInterrupt

    monkeypatch.setattr(
        speechbrain_stablequant, "quantize_pretrained", stand_in, raising=False
    )
    code, _, err = run(capsys, "quantize", "some/model", tmp_path, "out")
    assert code == 130
    line = "quantize: interrupted; go on"
    if not explains:
        line = "stablequant: interrupted"
    assert err.split("\n") == [*([line, ""] if explains else ["", line]), ""]


@pytest.mark.parametrize(
    "args, line",
    [
        (["no.py", "a.yaml"], "no.py: there is no such script"),
        ([__file__], "give its YAML"),
        ([__file__, __file__], "has no `quantize:` block"),
        ([__file__, sys.executable], f"{sys.executable}: is not UTF-8 ("),
        (["no/source", ".", "out", "--quantize", "8"], "--quantize: is no map"),
        (["no/source", ".", "out", "--quantize", "{a"], "--quantize: "),
        (
            ["no/source", ".", "out", "--quantize", "{output: a}"],
            "quantize.out",
        ),
        (["no/source", ".", "out", "--quantize", "{1: a}"], "quantize"),
        (["no/source", ".", "out"], ": holds no utterance"),
    ],
)
def test_quantize_refuses_in_one_line(
    args, line, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "quantize", *args)
    assert (code, out) == (1, "")
    (found,) = err.splitlines()
    assert found.startswith("stablequant: ")
    assert line in found


def test_another_run_in_the_folder_is_a_line(monkeypatch, capsys):
    def refuse(ctx):
        raise FolderInUse("quantize.output_folder: another run works in out")

    monkeypatch.setattr(app, "invoke", refuse)
    code, _, err = run(capsys, "inspect", ".")
    assert code == 1
    assert err.startswith("stablequant: quantize.output_folder: another run")


def test_a_pretrained_source(tmp_path, monkeypatch, capsys):
    """The options reach quantize_pretrained."""
    import speechbrain_stablequant

    seen = {}

    def stand_in(**options):
        seen.update(options)
        return speechbrain_stablequant.QuantizedSource(
            tmp_path, tmp_path / "report.json", 5.04, 5.19
        )

    monkeypatch.setattr(
        speechbrain_stablequant, "quantize_pretrained", stand_in, raising=False
    )
    code, out, _ = run(
        capsys,
        *("quantize", "some/model", tmp_path, "out", "--device", "cuda"),
        *("--quantize", "{method: mse, weight_bits: 6}", "--trust-source"),
    )
    assert code == 0
    assert out == f"WER 5.04 -> 5.19 %; the model: {tmp_path / 'model'}\n"
    given = seen["source"], seen["manifest"], seen["output"]
    assert given == ("some/model", tmp_path, Path("out"))
    assert (seen["method"], seen["weight_bits"]) == ("mse", 6)
    assert seen["trust_source"] and seen["run_opts"] == {"device": "cuda"}


def test_export(folder, tmp_path, capsys):
    pytest.importorskip("onnx")
    out = tmp_path / "out"
    command = ("export", folder, out, "--target", "onnxruntime")
    code, shown, _ = run(capsys, *command)
    assert code == 0
    assert shown.startswith(f"{out}: ")
    code, _, err = run(capsys, *command)
    assert code == 1
    assert f"{out}: exists" in err


def test_choices_are_those_of_the_package():
    def choices(command: str, name: str) -> list[str]:
        options = {x.name: x for x in app.commands[command].params}
        return list(options[name].type.choices)

    assert choices("export", "target") == list(ENGINES)
    assert set(choices("transcribe", "backend")) == {"auto", *RUNTIMES}
    (name,) = app.commands["keys"].params
    assert [x.value for x in name.shell_complete(None, "")] == list(METHODS)


def test_keys(capsys):
    code, out, _ = run(capsys, "keys", "qat")
    assert code == 0
    assert "- `qat.epochs` (int, default `3`; at least 1): " in out
    assert "`adaround.lr`" not in out
    code, out, err = run(capsys, "keys", "epochs")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.endswith("did you mean 'qat.epochs'?")
    complete = app.commands["keys"].params[0].shell_complete
    assert [x.value for x in complete(None, "max")] == ["max"]


def test_benchmark(folder, capsys):
    code, out, _ = run(
        capsys, "benchmark", folder, "--seconds", "1", "--rounds", "1"
    )
    assert code == 0
    assert "torch_int8" in out
    assert "backend: auto takes " in out


def test_columns():
    rows = [["a", "b", "c"], ["long", "1.5", "yes"], ["x", "12.5", "no"]]
    text = "a        b  c\nlong   1.5  yes\nx     12.5  no"
    assert plans.columns(rows) == text
