"""Several processes make the plan that one makes."""

import json
import signal
import socket
from itertools import accumulate
from pathlib import Path

import pytest
from trained_recipe import BLOCK, ONE_SET

SCRIPT = Path(__file__).resolve().parent / "distributed_recipe.py"
#: The last percentiles cannot win, so their evaluations stop early.
EARLY = BLOCK.replace("[100, 99.9, 99]", "[100, 99, 60, 20]")
PLUS = """
quantize: !apply:speechbrain_stablequant.register
    target: [wav2vec2, enc, ctc_lin]
    weight_bits: 4
    activation_bits: 8
    method: stablequant_plus
    calibration: {num_utterances: 5}
    search: {num_utterances: 5, cutoffs: [100, 99]}
    plus: {strengths: [0.5]}
    backend: torch
"""


def together(
    trained,
    output: Path,
    block: str,
    processes: int,
    *more: str,
    killed: int | None = None,
):
    """Runs the recipe in several processes, and gives what each left. One may
    be killed on the way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = trained.test_arguments(
        output, *ONE_SET, "--distributed_backend", "gloo", *more, block=block
    )
    scratch = output.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    started = [
        trained.starter.start(
            SCRIPT,
            *arguments,
            cwd=output.parent,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TMPDIR=str(scratch),
            KILLED_AT="40" if rank == killed else "0",
        )
        for rank in range(processes)
    ]
    return [process.wait() for process in started]


def plan_of(output: Path) -> dict:
    """The plan that a run has written."""
    return json.loads((output / "quantized" / "plan.json").read_text())


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> Path:
    """The output folder of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    done = trained.run(output, *ONE_SET, block=EARLY)
    assert done.code == 0, done.err
    journal = (output / "quantized" / "search.jsonl").read_text()
    whole, *scores = (json.loads(x)["score"] for x in journal.splitlines())
    words = [*accumulate(whole["utterance_words"])]
    stops = [1 + words.index(s["words"]) for s in scores if not s["complete"]]
    # Two processes notice some of them an utterance later.
    assert any(stop % 2 for stop in stops)
    return output


def test_two_processes_make_the_same_plan(trained, alone, tmp_path):
    output = tmp_path / "out"
    done = together(trained, output, EARLY, 2)
    assert [process.code for process in done] == [0, 0], done[1].err
    quantized = alone / "quantized"
    plan = (output / "quantized" / "plan.json").read_bytes()
    assert plan == (quantized / "plan.json").read_bytes()
    for name in ("histograms.json", "search.jsonl"):
        found = (output / "quantized" / name).read_bytes()
        assert sorted(found.splitlines()) == sorted(
            (quantized / name).read_bytes().splitlines()
        )
    for name in ("transcripts_clean.json", "wer_clean.txt"):
        found, expected = (
            (folder / "quantized" / name).read_text()
            for folder in (output, alone)
        )
        if name.endswith("json"):
            found, expected = (
                json.loads(text)["content"]["transcripts"]
                for text in (found, expected)
            )
        assert found == expected
    # one of them speaks and writes
    assert "report: " in done[0].out
    said = done[1].out.splitlines()
    # torch 2.8 itself tells of each connection
    assert not [line for line in said if not line.startswith("[Gloo] ")]
    reports = list(tmp_path.rglob("report.json"))
    assert reports == [output / "quantized" / "report.json"]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_next_start_goes_on(
    trained, alone, tmp_path, killed
):
    output = tmp_path / "out"
    quantized = output / "quantized"
    done = together(trained, output, EARLY, 2, killed=killed)
    assert done[killed].code == -signal.SIGKILL
    other = done[1 - killed]
    assert other.code == 1
    *_, last = other.err.splitlines()
    assert f"lost of 2 processes: rank {killed} (process " in last
    assert last.endswith("the run goes on from its journal")
    assert "Traceback" not in other.err
    assert not (quantized / "plan.json").exists()
    kept = (quantized / "search.jsonl").read_bytes()
    assert len(kept.splitlines()) > 5

    assert [p.code for p in together(trained, output, EARLY, 2)] == [0, 0]
    assert plan_of(output) == plan_of(alone)
    found = (quantized / "search.jsonl").read_bytes()
    assert found.startswith(kept)
    expected = (alone / "quantized" / "search.jsonl").read_bytes()
    assert sorted(found.splitlines()) == sorted(expected.splitlines())


@pytest.mark.slow
def test_rounding_is_shared(trained, tmp_path):
    """Sums over processes are as exact as those of one."""
    outputs = [tmp_path / "one", tmp_path / "three"]
    assert trained.run(outputs[0], *ONE_SET, block=PLUS).code == 0
    done = together(trained, outputs[1], PLUS, 3)
    assert [process.code for process in done] == [0, 0, 0], done[2].err
    one, three = (plan_of(output)["search"]["parts"] for output in outputs)
    assert one == three


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("method: qat", "quantize.method: qat runs in one process"),
        (
            "calibration: {num_utterances: 1}",
            "quantize.calibration: 1 batch(es) for 2 processes; start fewer",
        ),
    ],
)
def test_what_cannot_be_shared(trained, tmp_path, change, complaint):
    key = change.partition(":")[0]
    lines = [x for x in BLOCK.splitlines() if not x.strip().startswith(key)]
    block = "\n".join([*lines, f"    {change}", ""])
    done = together(trained, tmp_path / "out", block, 2)
    assert 0 not in [process.code for process in done]
    assert complaint in done[0].out + done[0].err
