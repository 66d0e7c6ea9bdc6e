"""The benchmark scripts, on a model so small that figures come at once."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import HubertForCTC

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HELPERS = (BENCHMARKS, BENCHMARKS.parent, os.environ.get("PYTHONPATH", ""))

#: Loads the triton runtime's executor as gpu.py does, in the interpreter.
INTERPRETED = """
import sys
import torch
import triton_interpreter
import gpu
import harness
import operators
import shapes
from workload import Workload

folder, model = sys.argv[1:]
argv = ["--model", model, "--seconds", "0.3", "--executors", "ours_triton"]
options = harness.parse(gpu.EXECUTORS, "cpu", argv)
workload = Workload(options, harness.Path(folder))
workload.make()
prepared = gpu.EXECUTORS["ours_triton"].load(workload)
with torch.no_grad():
    found = prepared.run(workload.wavs)
print("cosine", harness.cosine(found, workload.logits))
for op in shapes.operators("wav2vec2-base", 0.1, 1):
    if op.name in ("norms of the blocks", "projection", "attention"):
        results = op.launch(*operators.filled(op, "cpu"))
        first = results if isinstance(results, torch.Tensor) else results[0]
        print(op.name, bool(first.float().isfinite().all()))
"""


def run_script(*arguments: object, **environment: str):
    """A script of the benchmarks in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=BENCHMARKS,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, HELPERS)),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "script", sorted(BENCHMARKS.glob("*.py")), ids=lambda x: x.stem
)
def test_each_says_what_it_takes(starter, script):
    """Started as the README says, from another folder."""
    if "__main__" not in script.read_text(encoding="utf-8"):
        pytest.skip("no command")
    said = starter.run(script, "--help", cwd=BENCHMARKS.parent)
    assert said.code == 0, said.err
    assert said.out.startswith("usage: ")


@pytest.fixture
def benchmarks(monkeypatch):
    """Their modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ctc_folder(make_tiny_model, tmp_path) -> Path:
    """A tiny CTC model on disk."""
    encoder = make_tiny_model("hubert-large")
    model = HubertForCTC(encoder.config)
    model.hubert.load_state_dict(encoder.state_dict())
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_cpu_gives_real_figures(benchmarks, ctc_folder, tmp_path, capsys):
    names = ["torch_fp32", "ours_torch"]
    importlib.import_module("cpu").main(
        [
            *("--model", str(ctc_folder), "--seconds", "0.5", "--batch", "2"),
            *("--executors", ",".join(names), "--rounds", "3"),
            *("--threads", "1", "--json", str(tmp_path / "rows.json")),
        ]
    )
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "rows.json").read_text())
    for part in ("cpu_class: ", "threads: 1", *names):
        assert part in printed
    assert content["machine"]["threads"] == 1
    rows = {row["executor"]: row for row in content["rows"]}
    assert list(rows) == names
    for row in rows.values():
        assert row["error"] is None
        assert len(row["times_ms"]) == 3
        assert row["median_ms"] == sorted(row["times_ms"])[1]
        assert row["cpu_ms"] > 0
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["rtf"] == pytest.approx(row["median_ms"] / 1e3, abs=1e-6)
        assert row["process_mb"] > row["peak_mb"] > 0
        assert row["load_s"] > 0
        assert row["size_mb"] > 0
    assert rows["torch_fp32"]["cosine"] == 1
    assert 0.9 < rows["ours_torch"]["cosine"] < 1


def measure(executors: dict, folder: Path, *options: str) -> list:
    """The rows of executors, in this process."""
    import harness

    arguments = ["--model", str(folder), "--seconds", "0.2", "--no-peak"]
    arguments += ["--threads", "1", *options]
    return harness.main(executors, "cpu", "none.py", argv=arguments)


def test_failed_executor_is_a_row(benchmarks, ctc_folder):
    import harness
    from executors import torch_
    from workload import Executor, Prepared

    def fail(workload):
        raise RuntimeError("this CPU has no such unit\nand more")

    def fails_later(workload):
        calls = []

        def run(wavs):
            calls.append(1)
            if len(calls) > 3:  # not while it is warmed up
                raise MemoryError("full")
            return workload.logits

        return Prepared(run, 1.0)

    executors = {
        "late": Executor(fails_later),
        "good": Executor(torch_.fp32),
        "bad": Executor(fail),
    }
    rows = measure(executors, ctc_folder, "--rounds", "1")
    assert [row.error for row in rows] == [
        "MemoryError: full",
        None,
        "RuntimeError: this CPU has no such unit",
    ]
    text = harness.table(rows, {"cpu": "any"})
    assert "bad                    FAILED: RuntimeError: this CPU" in text
    assert [row.median_ms is None for row in rows] == [True, False, True]


def test_what_takes_too_long_is_left_out(benchmarks, ctc_folder):
    from executors import torch_
    from workload import Executor

    executors = {name: Executor(torch_.fp32) for name in ("first", "second")}
    rows = measure(executors, ctc_folder, "--minutes", "1e-6")
    assert rows[0].median_ms > 0  # the first one is loaded in any case
    assert rows[1].error == "no time left of 1e-06 minutes"


def test_everyone_gets_the_same_turns(benchmarks):
    import harness
    from workload import Prepared

    calls = []
    prepared = {
        name: Prepared(lambda wavs, name=name: calls.append(name), 0.0)
        for name in "abc"
    }
    times = harness.interleave(prepared, torch.zeros(1), 3, None)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
    }


def test_grid_ends_in_time(benchmarks, tmp_path, capfd, monkeypatch):
    import grid

    limits = []

    def run(command, timeout, **_):
        limits.append((float(command[command.index("--minutes") + 1]), timeout))
        time.sleep(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(grid.subprocess, "run", run)
    arguments = ["cpu", "--folder", str(tmp_path), "--minutes", "0.002"]
    with pytest.raises(SystemExit, match="no size was measured"):
        grid.main(arguments)
    ((minutes, seconds),) = limits
    assert 0 < minutes <= 0.002
    assert seconds == pytest.approx(60 * minutes, abs=0.06)
    printed = capfd.readouterr().err
    assert "('hubert-large', 10.0, 8): failed" in printed
    assert "0.002 minutes are over" in printed


@pytest.mark.slow
def test_grid_goes_on_and_makes_one_table(benchmarks, ctc_folder, tmp_path):
    import grid

    arguments = [
        *("cpu", "--folder", str(tmp_path), "--models", str(ctc_folder)),
        *("--lengths", "0.2", "0.3", "--batches", "1"),
        *("--executors", "ours_torch,torch_fp32", "--rounds", "1"),
    ]
    text = grid.main([*arguments, "--lengths", "0.2"])
    assert text.count("0.2 s x 1") == 1
    assert "0.3 s" not in text
    (first,) = tmp_path.glob("*-0.2s-1.json")
    before = first.stat().st_mtime_ns
    head, _, ours, float_row = grid.main(arguments).splitlines()[-4:]
    assert first.stat().st_mtime_ns == before
    name = ctc_folder.name
    assert head == f"| median ms | {name} 0.2 s x 1 | {name} 0.3 s x 1 |"
    assert ours.startswith("| ours_torch | ")
    assert ours.count("(1.00x)") == 2
    rows = json.loads(first.read_text())["rows"]
    times = {row["executor"]: row["median_ms"] for row in rows}
    ratio = times["torch_fp32"] / times["ours_torch"]
    assert float_row.startswith(
        f"| torch_fp32 | {times['torch_fp32']:.2f} ({ratio:.2f}x) |"
    )


@pytest.mark.slow
def test_grid_says_what_failed(benchmarks, tmp_path, capfd):
    import grid

    arguments = ["cpu", "--folder", str(tmp_path), "--models", "none"]
    with pytest.raises(SystemExit, match="no size was measured"):
        grid.main([*arguments, "--lengths", "1", "--batches", "1"])
    assert "('none', 1.0, 1): failed" in capfd.readouterr().err
    found = {("a", 1.0, 1): {"machine": {}, "rows": [
        {"executor": "x", "median_ms": None},
        {"executor": "y", "median_ms": 2.0},
    ]}}  # fmt: skip
    assert grid.table(found).splitlines()[2:] == [
        "| x | failed |",
        "| y | 2.00 |",
    ]


def test_grid_begins_with_what_tells_most(benchmarks):
    import grid

    found = grid.sizes(grid.MODELS, [5.0, 10.0], [1, 8])
    assert found[:2] == [("hubert-large", 10.0, 8), ("hubert-large", 10.0, 1)]
    assert found[2] == ("wav2vec2-base", 10.0, 8)
    assert len(found) == len(set(found)) == 8


@pytest.fixture
def soak(benchmarks, monkeypatch, make_tiny_modules, tmp_path):
    """The script, and its arguments for a tiny folder."""
    integration = BENCHMARKS.with_name("integration")
    monkeypatch.syspath_prepend(str(integration))
    tiny_folder = importlib.import_module("tiny_folder")
    script = importlib.import_module("soak")
    torch.manual_seed(1)
    folder = tmp_path / "quantized"
    tiny_folder.write(folder, make_tiny_modules("wav2vec2-large"))
    arguments = [str(folder), "--runtime", "torch_int8", "--calls", "8"]
    return script, script.parse([*arguments, "--threads", "4"])


@pytest.mark.parametrize("check", ["threads", "two", "repeat"])
def test_soak_counts_wrong_answers(soak, monkeypatch, check):
    script, args = soak
    waves = [torch.randn(3000 + 700 * i) for i in range(4)]
    monkeypatch.setattr(script, "pieces", lambda args: waves)
    rows = list(script.CHECKS[check](args))
    assert [row["passed"] for row in rows] == [True] * len(rows)
    calls = iter(range(1, 10**6))
    original = script.Recognizer.encode_batch

    def sometimes_other(self, wavs, lengths):
        found = original(self, wavs, lengths)
        return found + 1 if next(calls) % 9 == 0 else found

    monkeypatch.setattr(script.Recognizer, "encode_batch", sometimes_other)
    rows = list(script.CHECKS[check](args))
    assert any(row["passed"] is False for row in rows)


def test_soak_tells_what_children_say(soak):
    script, _ = soak
    line = "it was used before; load the recognizer after the fork"
    for said, prompt in (
        ({"error": line, "seconds": 0.2}, True),
        ({"error": line, "seconds": 1.2}, False),
        ({"error": f"{line}\nmore", "seconds": 0.2}, False),
        ({"error": "Segmentation fault", "seconds": 0.2}, False),
        ({"texts": ["A"]}, False),
    ):
        assert script.is_prompt_line(said) is prompt


def test_soak_ends_what_hangs(soak, monkeypatch, tmp_path, capsys):
    script, _ = soak
    program = tmp_path / "slow.py"
    row = {"case": "first", "passed": True}
    program.write_text(
        f"import time\nprint('row ' + {json.dumps(row)!r}, flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(script, "__file__", str(program))
    arguments = ["none", "--runtimes", "onnx", "--checks", "repeat"]
    rows = script.main([*arguments, "--limit", "1.5"])
    assert [row["case"] for row in rows] == [
        "first",
        "hangs: not done in 1.5 s",
    ]
    assert [row["passed"] for row in rows] == [True, False]
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == (
        "onnx repeat hangs: not done in 1.5 s FAILED"
    )


@pytest.mark.parametrize("script", ["gpu", "operators"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_gpu_scripts_need_a_device(benchmarks, script):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main([])
    assert stopped.value.code == (
        f"{script}.py: needs a CUDA device, and torch finds none here"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--executors", "torch_fp32,mine"],
            "executor 'mine' is none of ours_triton, torch_fp32, ",
        ),
        (["--model", "none"], "model 'none' is none of hubert-base, "),
    ],
)
def test_unknown_names_are_errors(benchmarks, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        importlib.import_module("gpu").main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.slow
def test_triton_executor_in_the_interpreter(ctc_folder, tmp_path):
    finished = run_script(
        *("-c", INTERPRETED, tmp_path / "files", ctc_folder),
        TRITON_INTERPRET="1",
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = finished.stdout.splitlines()
    assert 0.9 < float(lines[0].split()[1]) < 1
    assert lines[1:] == [
        "projection True",
        "norms of the blocks True",
        "attention True",
    ]
