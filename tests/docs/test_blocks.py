"""Code blocks of the documentation are run, or say why not.

A block is run after the earlier ones of its page, in a folder with a small
quantized folder and audio. ``<!-- not run: REASON -->`` above a block skips it
(``pytest -rs tests/docs`` lists these), ``<!-- run: slow -->`` runs it as a
command line in a copy of the recipe.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml
from quantized_folder import SETTINGS, write

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.cli.app import main
from speechbrain_stablequant.core.plan import PLAN_FILE

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "speechbrain_stablequant"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(
    r"(?:<!-- (?P<mark>(?:not )?run): (?P<reason>.+?) -->\s*)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHOWN = ("text",)
FOLDER = "results/quant/1986/quantized/model"


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    mark: str | None
    reason: str | None


def blocks() -> list[Block]:
    """Those of all pages, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            parts = match.group("language", "text", "mark", "reason")
            found.append(Block(page, line, *parts))
    return [x for x in found if x.language not in SHOWN]


def named(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


BLOCKS = blocks()
SLOW = [x for x in BLOCKS if (x.mark, x.reason) == ("run", "slow")]


@pytest.fixture(scope="module")
def place(make_tiny_modules, tmp_path_factory) -> Path:
    """A folder to run them in."""
    torch.manual_seed(7)
    place = tmp_path_factory.mktemp("docs")
    modules = make_tiny_modules("wav2vec2-large")
    write(place / FOLDER, modules, encoder=SETTINGS)
    # As a run has it, beside what loads.
    shutil.copy(place / FOLDER / PLAN_FILE, (place / FOLDER).parent)
    for name in ("speech.flac", "lecture.wav"):
        soundfile.write(place / name, 0.1 * torch.randn(16000).numpy(), 16000)
    return place


@pytest.fixture(scope="module")
def names() -> dict:
    """Variables of each page's Python."""
    return {page: {"__name__": "__main__"} for page in PAGES}


@pytest.mark.parametrize(
    "block", [x for x in BLOCKS if x not in SLOW], ids=named
)
def test_block(block, place, names, monkeypatch, capsys):
    if block.mark is not None:
        pytest.skip(block.reason)
    monkeypatch.chdir(place)
    if block.language == "python":
        code = compile(block.text, named(block), "exec")
        exec(code, names[block.page])
    elif block.language == "yaml":
        text = block.text
        if not text.startswith("quantize:"):
            head = "quantize: !apply:speechbrain_stablequant.register\n"
            text = head + text
        config = load_hyperpyyaml(text)["quantize"]
        assert isinstance(config, QuantizeConfig)
    else:
        assert block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            assert program == "stablequant", "only this command is run here"
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 0, capsys.readouterr().err
            assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("block", SLOW, ids=named)
def test_slow_block(block, tmp_path):
    recipe = "recipes/LibriSpeech/ASR/CTC"
    ignore = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / recipe, tmp_path / recipe, ignore=ignore)
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    done = subprocess.run(
        ["bash", "-ec", block.text],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("report.html"))


# -- troubleshooting -----------------------------------------------------------


def texts_of_package() -> str:
    """Texts of the package's code; gaps are what is filled in."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(x, "value", None) for x in node.values]
                kept = [x if isinstance(x, str) else "\0" for x in parts]
                found.append("".join(kept))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_troubleshooting_are_those_of_the_package():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    assert len(rows) > 15
    known = texts_of_package()
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row):
            if message == "undefined symbol":
                continue  # of the loader of Linux
            for part in message.split("..."):
                assert part.strip(" :'") in known, row
