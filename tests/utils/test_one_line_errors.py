"""Errors of this package end a process in one line, and no other error."""

import json
import logging
import sys

import pytest

from speechbrain_stablequant import QuantizeConfig
from speechbrain_stablequant.utils import one_line_errors
from speechbrain_stablequant.utils.files import read_json
from speechbrain_stablequant.utils.lock import FolderInUse
from speechbrain_stablequant.utils.one_line_errors import end_in_one_line

WRONG = {"weight_bitz": 8}
LINE = "stablequant: quantize.weight_bitz: unknown key; did you mean"


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def shown(capsys, action) -> str:
    """What the hook writes about an error."""
    try:
        action()
    except Exception:
        sys.excepthook(*sys.exc_info())
    out, err = capsys.readouterr()
    assert not out
    assert err
    return err


def of_package(body: str, **names):
    """A function of a module of the package."""
    place = {"__name__": "speechbrain_stablequant.core.made_up", **names}
    exec(f"def made_up():\n    {body}", place)
    return place["made_up"]


def test_a_wrong_block(capsys, caplog):
    caplog.set_level(logging.DEBUG, one_line_errors.__name__)
    end_in_one_line()
    err = shown(capsys, lambda: QuantizeConfig.from_dict(WRONG))
    assert err.startswith(LINE)
    assert len(err.splitlines()) == 1
    (record,) = caplog.records
    assert record.levelname == "DEBUG"
    assert "Traceback" in caplog.text and "ConfigError" in caplog.text


def test_a_missing_file_and_a_folder_in_use(capsys, tmp_path):
    end_in_one_line()
    err = shown(capsys, lambda: read_json(tmp_path / "no.json", "plan"))
    assert err.startswith("stablequant: cannot read the plan '")
    in_use = of_package("raise FolderInUse('in use')", FolderInUse=FolderInUse)
    assert shown(capsys, in_use) == "stablequant: in use\n"


def other(name: str):
    """Raises a ValueError that is none of the package's."""
    if name == "of the caller":
        raise ValueError("mine")
    if name == "of another package":
        of_package("json.loads('{')", json=json)()
    if name == "of a callback that raises":
        of_package("call()", call=lambda: other("of the caller"))()
    if name == "of an expression":
        of_package("return int('one')")()
    if name == "while a message is made":
        of_package("raise ValueError(int('one'))")()
    if name == "of code, raised again":
        body = "try: int('one')\n    except ValueError: raise"
        of_package(body)()


@pytest.mark.parametrize(
    "name",
    [
        *("of the caller", "of another package", "of a callback that raises"),
        *("of an expression", "while a message is made"),
        "of code, raised again",
    ],
)
def test_other_errors_have_their_traceback(capsys, name):
    end_in_one_line()
    err = shown(capsys, lambda: other(name))
    assert err.startswith("Traceback (most recent call last):\n")
    assert "ValueError" in err.splitlines()[-1] or "JSONDecode" in err


@pytest.mark.parametrize(
    "body, kind",
    [("raise TypeError('a fault')", "TypeError"), ("assert False", "Assert")],
)
def test_faults_of_the_package_have_their_traceback(capsys, body, kind):
    end_in_one_line()
    err = shown(capsys, of_package(body))
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith(kind)


def test_hooks_of_others_stay_and_ours_is_put_in_once(monkeypatch):
    end_in_one_line()
    ours = sys.excepthook
    end_in_one_line()
    assert sys.excepthook is ours

    def theirs(*error):
        pass

    monkeypatch.setattr(sys, "excepthook", theirs)
    end_in_one_line()
    assert sys.excepthook is theirs


RECIPE = """
import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml

with open(sys.argv[1]) as file:
    hparams = load_hyperpyyaml(file)
sb.create_experiment_directory("out", save_env_desc=False)
try:
    sb.Brain(hparams["modules"], hparams=hparams, run_opts={"device": "cpu"})
except ValueError as error:
    if hparams["wraps"]:
        raise ValueError("of the recipe") from error
    raise
"""
YAML = """
wraps: {wraps}
output_folder: out
modules: {{enc: !new:torch.nn.Linear [4, 4]}}
quantize: !apply:speechbrain_stablequant.register
    {key}
"""


@pytest.mark.parametrize(
    "key, wraps, words",
    [
        ("activation_bit: 8", False, "did you mean 'activation_bits'?"),
        ("target: [encoder]", False, "quantize.target: 'encoder'"),
        ("target: [encoder]", True, None),
    ],
)
def test_a_recipe(key, wraps, words, starter, tmp_path):
    """Its errors of a wrong block, before and after SpeechBrain's own hook."""
    (tmp_path / "train.py").write_text(RECIPE)
    (tmp_path / "quant.yaml").write_text(YAML.format(key=key, wraps=wraps))
    done = starter.run(tmp_path / "train.py", "quant.yaml", cwd=tmp_path)
    assert done.code == 1
    shown = done.out + done.err
    log = tmp_path / "out" / "log.txt"
    text = log.read_text() if log.exists() else ""
    assert log.exists() == key.startswith("target")
    if words is None:
        assert "Traceback" in shown and "ValueError: of the recipe" in shown
        return
    assert "Traceback" not in shown
    # Above it there may be what other packages log when they are imported.
    line = done.err.splitlines()[-1]
    assert line.startswith("stablequant: ") and words in line
    assert ("Traceback" in text) == log.exists()
