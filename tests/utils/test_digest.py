"""Objects and code are identified by what they are."""

import functools
import logging
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from speechbrain_stablequant.utils import digest as digest_module
from speechbrain_stablequant.utils.digest import (
    Code,
    FileDigests,
    digest,
    structure_digest,
    tensor_digest,
)
from speechbrain_stablequant.utils.store import Store

BEAM = 8


@dataclass
class Searcher:
    beam: int = 8
    weights: dict = None

    def __call__(self, x):
        return helper(x) * BEAM


class Slots:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size


class Kind(Enum):
    ONE = 1
    TWO = 2


def helper(x):
    """Adds one."""
    return x + 1


VALUES = {
    "none": None,
    "number": 1,
    "truth": True,
    "float": 1.0,
    "nan": float("nan"),
    "text": "1",
    "bytes": b"1",
    "list": [1],
    "nested": [[1]],
    "mapping": {"a": 1},
    "other mapping": {"a": 2},
    "set": {"a", "b"},
    "tensor": torch.ones(2),
    "other tensor": torch.ones(1, 2),
    "half": torch.ones(2).half(),
    "array": np.ones(2),
    "objects": np.array([1, "a"], dtype=object),
    "enum": Kind.ONE,
    "other enum": Kind.TWO,
    "object": Searcher(),
    "other object": Searcher(beam=9),
    "deep object": Searcher(weights={"lm": torch.ones(1)}),
    "other deep object": Searcher(weights={"lm": torch.zeros(1)}),
    "slots": Slots(1),
    "other slots": Slots(2),
    "class": Searcher,
    "partial": functools.partial(helper, 1),
    "other partial": functools.partial(helper, 2),
    "function": helper,
    "lambda": lambda x: x + 2,
    "library": torch.relu,
    "method": Searcher().__call__,
    "module": nn.Dropout(0.1),
    "other module": nn.Dropout(0.2),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "path": Path("a") / "b",
}


def test_all_values_differ():
    found = {name: digest(value) for name, value in VALUES.items()}
    assert len(set(found.values())) == len(VALUES)
    assert found == {name: digest(value) for name, value in VALUES.items()}


def test_another_process_finds_the_same():
    """Addresses and the order of sets are its own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.manual_seed(0)\n"
        "import test_digest as t\n"
        "print(t.digest(list(t.VALUES.values())))\n"
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", code, here]
    found = [
        subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1] != ""


def test_a_circle_and_what_lies_too_deep():
    one = Searcher()
    one.weights = {"me": one, "log": logging.getLogger("x")}
    assert digest(one) == digest(one)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert digest(deep)


def test_a_function_at_any_depth():
    deep, found = helper, set()
    for _ in range(20):
        deep = [deep]
        found.add(digest(deep))
    assert len(found) > 2


def test_known_objects_count_by_their_name():
    linear = nn.Linear(2, 2)
    holder = Searcher(weights={"lm": linear})
    known = {id(linear): "ctc_lin"}
    before, plain = digest(holder, known), digest(holder)
    with torch.no_grad():
        linear.weight.add_(1)
    assert digest(holder, known) == before
    assert digest(holder) != plain


def test_places_do_not_count():
    a, b = Searcher(), Searcher()
    a.source, b.source = "here", "there"
    assert digest(a) == digest(b)


class Encoder(nn.Module):
    def __init__(self, output_norm=False):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, stride=2)
        self.act = nn.GELU()
        self.output_norm = output_norm

    def forward(self, x):
        return self.act(self.conv(x))


class Edited(Encoder):
    def forward(self, x):
        return self.act(self.conv(x)) + 1


def edit(change):
    module = Encoder()
    change(module)
    return structure_digest({"wav2vec2": module})


def test_structure_is_settings_and_code_without_weights():
    same = edit(lambda m: None)
    assert edit(lambda m: m.conv.weight.data.add_(1)) == same
    assert edit(lambda m: m.eval()) == same
    assert edit(lambda m: m.register_forward_hook(print)) == same
    others = [
        edit(lambda m: setattr(m, "output_norm", True)),
        edit(lambda m: setattr(m, "act", nn.ReLU())),
        edit(lambda m: setattr(m.conv, "stride", (1,))),
        edit(lambda m: setattr(m, "act", nn.GELU(approximate="tanh"))),
        structure_digest({"enc": Encoder()}),
        structure_digest({"wav2vec2": Edited()}),
    ]
    assert len({same, *others}) == 1 + len(others)


def test_running_a_model_changes_no_structure(make_tiny_modules):
    modules = dict(make_tiny_modules("wav2vec2-large").items())
    before = structure_digest(modules)
    with torch.no_grad():
        modules["wav2vec2"](torch.randn(1, 1300))
    assert structure_digest(modules) == before
    config = modules["wav2vec2"].model.config
    config.layer_norm_eps *= 2
    assert structure_digest(modules) != before


def code_of(source, name="f", **variables):
    """Code of a function of a module that is no library's."""
    space = {"__name__": "__main__", **variables}
    exec(source, space)
    return Code([space[name]])


def test_code_counts_and_not_how_it_is_written():
    one = code_of("def f(x):\n    return g(x)\ndef g(x): return x + 1")
    same = code_of(
        "# more\n\ndef f(x):\n    '''Says.'''\n    # so\n    return g(x)\n"
        "def g(x):\n\n    return x + 1"
    )
    assert same.digest == one.digest
    others = [
        "def f(x):\n    return g(x)\ndef g(x): return x + 2",
        "def f(x):\n    return g(x)\ndef g(x): return x - 1",
        "def f(x, y=1):\n    return g(x)\ndef g(x): return x + 1",
        "def f(x):\n    return h(x)\ndef h(x): return x + 1",
        "def f(x):\n    return g(x)\ng = lambda x: x + 1\nK = 1",
    ]
    found = {code_of(source).digest for source in others}
    assert len({one.digest, *found}) == 1 + len(others)


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages", "recipe"])
def test_packages_of_another_prefix_are_libraries(folder):
    """As a virtual environment sees those of the system."""
    space = {}
    exec(compile("def f(x): ...", f"/opt/{folder}/torch/x.py", "exec"), space)
    assert digest_module.is_library(space["f"]) == (folder != "recipe")


def test_variables_and_closures_count():
    source = "def f(x):\n    return x in NAMES"
    names = [{"a", "b"}, {"a", "c"}, ["a", "b"]]
    assert len({code_of(source, NAMES=n).digest for n in names}) == 3

    def made(step):
        return lambda x: x + step

    assert Code([made(1)]).digest == Code([made(1)]).digest
    assert Code([made(1)]).digest != Code([made(2)]).digest


def test_methods_that_are_named_are_followed():
    def make(body):
        space = {"__name__": "__main__"}
        exec(
            "class B:\n"
            "    def forward(self, x): return self.decode(x)\n"
            f"    def decode(self, x): return {body}\n"
            "    def other(self): return 5\n",
            space,
        )
        kind = space["B"]
        return Code([kind.forward], kind)

    assert make("x").digest == make("x").digest != make("x + 1").digest
    assert {"decode", "x"} & make("x").names == {"decode"}


def test_tensors_of_each_dtype():
    kinds = (torch.bool, torch.int64, torch.bfloat16, torch.float64)
    found = {tensor_digest(torch.ones(3).to(kind)) for kind in kinds}
    assert len(found) == len(kinds)
    assert tensor_digest(torch.ones(())) != tensor_digest(torch.ones(1))
    x = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(x.T) == tensor_digest(x.T.contiguous())


def test_files_are_read_again_when_they_change(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(b"one")
    store = Store(tmp_path / "store")
    digests = FileDigests(store)
    first = digests.of(str(path))
    digests.keep()
    calls = []
    original = digest_module.file_digest
    monkeypatch.setattr(
        digest_module, "file_digest", lambda p: calls.append(p) or original(p)
    )
    again = FileDigests(Store(tmp_path / "store"))
    assert again.of(str(path)) == first
    assert calls == []
    path.write_bytes(b"two")
    assert FileDigests(store).of(str(path)) != first
    assert calls == [str(path)]
    # The same content at another place is the same.
    (tmp_path / "copy.wav").write_bytes(b"one")
    assert FileDigests(store).of(str(tmp_path / "copy.wav")) == first


@pytest.mark.parametrize("value", ["a/b", "wrd", "a\0/b", 5, None, "/"])
def test_what_is_no_file_is_itself(value):
    assert FileDigests(Store(None)).of(value) is value
