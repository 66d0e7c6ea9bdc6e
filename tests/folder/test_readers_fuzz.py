"""All readers and the block, given files that were changed at random.

Whatever a file says, a reader gives a value or raises one of our exceptions,
one line long; it writes nothing, starts nothing, and takes neither much time
nor much memory. Checksums are made right again after a change where a person
who makes a folder could do so.

    STABLEQUANT_FUZZ_EXAMPLES=20000 pytest tests/folder/test_readers_fuzz.py
"""

import copy
import gc
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_folder import forget_spec, sign, write
from speechbrain.utils.importutils import LazyModule

import speechbrain_stablequant
from speechbrain_stablequant.config import ConfigError
from speechbrain_stablequant.core.error_rates import Transcript
from speechbrain_stablequant.core.histogram import Histogram
from speechbrain_stablequant.core.layer_quant import LayerTensors
from speechbrain_stablequant.core.plan import QuantizationPlan
from speechbrain_stablequant.core.plan_tensors import (
    AdjustedTensors,
    read_tensors,
    write_tensors,
)
from speechbrain_stablequant.folder.errors import CheckpointError
from speechbrain_stablequant.folder.weights_file import load_checkpoint
from speechbrain_stablequant.methods.search.journal import Journal
from speechbrain_stablequant.methods.search.score import Score
from speechbrain_stablequant.methods.session.histograms import Calibration
from speechbrain_stablequant.model.wrapper import StoredEncoder
from speechbrain_stablequant.report.results import Effort, Evaluation, Turns
from speechbrain_stablequant.transcribe.load import load
from speechbrain_stablequant.utils.files import file_digest, read_json
from speechbrain_stablequant.utils.store import Store
from speechbrain_stablequant.utils.tensor_bytes import (
    bytes_to_tensors,
    tensors_to_bytes,
)

# hypothesis asks all modules for their file; SpeechBrain's lazy ones would be
# imported by that, and some cannot be.
LazyModule.__file__ = None

PACKAGE = str(Path(speechbrain_stablequant.__file__).parent)
OURS = (CheckpointError, ConfigError, ValueError)
SECONDS = 5.0
MEGABYTES = 1000
DEFAULT = 520


# -- what changes ------------------------------------------------------------

NAMES = ["", "..", "../../secret", "/etc/passwd", "a\nb", "\u2028", "x" * 3000]
TEXTS = [*NAMES, "NaN", "é\U0001f600", "\ud800", "\0", "torch.nn.Linear", "8"]
NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63, 10**18, 10**400, -(10**30)]
FLOATS = [0.5, -1e-320, 1e308, math.nan, math.inf, -math.inf, 8.0]


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind == 3:
        return rng.choice([None, True, False])
    if kind < 6:
        return rng.choice(TEXTS)
    if kind == 6:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        deep: Any = 1
        for _ in range(rng.choice([3, 60, 90])):
            deep = [deep] if rng.randrange(2) else {"a": deep}
        return deep
    names = [rng.choice(TEXTS) for _ in range(rng.randrange(3))]
    return {name: odd(rng, depth + 1) for name in names}


def places(tree: Any) -> list[tuple]:
    """Containers and keys of all values below a tree."""
    found: list[tuple] = []
    rows = [tree]
    while rows:
        node = rows.pop()
        if isinstance(node, dict):
            found += [(node, key) for key in node]
            rows += node.values()
        elif isinstance(node, list):
            found += [(node, i) for i in range(min(len(node), 20))]
            rows += node[:20]
    return found


def changed(rng: random.Random, tree: Any) -> Any:
    """A tree with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        spots = places(tree)
        if not spots or rng.randrange(20) == 0:
            return odd(rng)
        node, key = spots[rng.randrange(len(spots))]
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(TEXTS)] = odd(rng)
        elif kind == 2:
            node[key] = [node[key]]
        elif kind == 3:
            other, name = spots[rng.randrange(len(spots))]
            node[key] = copy.deepcopy(other[name])
        else:
            node[key] = odd(rng)
    return tree


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were cut, flipped, repeated or replaced."""
    kind = rng.randrange(6)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]
    if kind == 2:
        return data[:place] + data[place // 2 :]
    if kind == 3:
        return rng.choice([b"", b"\0" * 64, b"[" * 5000, b"\xff\xfe" * 20])
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        if out:
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def write_json(path: Path, tree: Any) -> None:
    """As JSON, with all that Python writes and JSON does not have."""
    try:
        path.write_text(json.dumps(tree), encoding="utf-8")
    except RecursionError:  # too deep to be written
        path.write_text("[" * 5000, encoding="utf-8")


def edit(rng: random.Random, path: Path) -> None:
    """Changes a JSON file, mostly inside of its tree."""
    data = path.read_bytes()
    if rng.randrange(6):
        write_json(path, changed(rng, json.loads(data)))
    else:
        path.write_bytes(spoiled(rng, data))


def reworded(rng: random.Random, text: str) -> str:
    """A text of which words were exchanged for others or for odd ones."""
    words = text.split(" ")
    for _ in range(rng.choice([1, 1, 2, 4])):
        new = rng.choice(
            [
                *("!apply:os.mkdir [canary]", "!new:os.mkdir", "!ref <a>"),
                *("&a", "*a", "{", "[", "]", ":", "-", "!!python/name:os.x"),
                *("1e999", "0x1" + "0" * 300, "\t", "\n", "'", "(1, 2)"),
                *map(str, NUMBERS),
                rng.choice(words),
            ]
        )
        words[rng.randrange(len(words))] = new
    return " ".join(words)


# -- what is watched ---------------------------------------------------------


class Watch:
    """What a reader does to the outside while it is armed."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
            if writes and not self._is_ours(path):
                self.seen.append(f"{event} {path}")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir"):
            if not self._is_ours(args[0]):
                self.seen.append(f"{event} {args[0]}")
        elif event in ("subprocess.Popen", "os.system", "socket.connect"):
            self.seen.append(event)

    def _is_ours(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return True
        place = os.path.abspath(path)
        cached = "__pycache__" in place or place.startswith("/dev/")
        return cached or place.startswith(self.inside)


@pytest.fixture(scope="module")
def watch():
    """One for the whole process: an audit hook cannot be taken back."""
    return Watch()


def check(reader: Callable[[], Any], folder: Path, watch: Watch) -> None:
    """Runs a reader and looks at what comes of it."""
    watch.inside, watch.seen = str(folder), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        reader()
    except OURS as error:
        text = str(error)
        assert type(error) in OURS, repr(error)
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        raised_in = place.tb_frame.f_code.co_filename
        assert raised_in.startswith(PACKAGE), f"{raised_in}: {error!r}"
        assert len(text.splitlines()) == 1, text
        assert len(text) < 2000, text[:2000]
    finally:
        watch.inside = None
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert grown < MEGABYTES * 1000, f"{grown / 1000:.0f} MB more"
    assert not watch.seen


# -- what is read ------------------------------------------------------------


@pytest.fixture(scope="module")
def base(make_tiny_modules, tmp_path_factory) -> Path:
    """Folders and files of all kinds, all of them right."""
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(11)
    made = make_tiny_modules("hubert-base", num_hidden_layers=1)
    encoder = StoredEncoder(made["wav2vec2"].model, False, False)
    write(root / "new", {**dict(made.items()), "wav2vec2": encoder})
    shutil.copytree(root / "new", root / "old")
    forget_spec(root / "old")
    load(root / "new")
    load(root / "old")
    other = root / "other"
    other.mkdir()
    layer = LayerTensors(
        torch.tensor([[1, -7], [3, 2]], dtype=torch.int8),
        torch.ones(2),
        torch.zeros(2),
    )
    tensors = AdjustedTensors({"enc": layer}, {"norm.weight": torch.ones(3)})
    write_tensors(other / "plan.safetensors", tensors, {"enc": 4})
    histogram = Histogram(num_bins=128)
    histogram.add(torch.linspace(0, 3, 50))
    histograms = Calibration({"enc": histogram}, True).to_dict()
    Store(other).write("histograms.json", "k", histograms)
    said = [Transcript("u1", "ONE TWO", "ONE"), Transcript("u2", "A", "A")]
    turns = Turns([2.0], [1.0], [3.0])
    Evaluation(said, turns=turns).write(Store(other), "transcripts.json", "k")
    Effort(1.0, {"search": 3}).remembered(Store(other), "effort.json", "k")
    for errors in range(3):
        score = Score(errors, 9, 0.5, True, (errors,), (9,), (0.5,))
        row = {"key": str(errors), "label": "a", "score": score.to_dict()}
        Store(other).append("search.jsonl", row)
    assert len(Journal(Store(other), "k")._scores) == 3
    return root


def config_json(rng, folder):
    """An encoder's configuration, by both ways of making modules."""
    edit(rng, folder / "new/config.json")
    sign(folder / "new")
    backend = rng.choice(["auto", "torch"])
    return lambda: load(folder / "new", backend)


def labels(rng, folder):
    """A label encoder."""
    path = folder / "new/label_encoder.txt"
    data = path.read_bytes()
    if rng.randrange(2):
        path.write_bytes(spoiled(rng, data))
    else:
        text = reworded(rng, data.decode())
        path.write_bytes(text.encode("utf-8", "replace"))
    sign(folder / "new")
    return lambda: load(folder / "new")


def recognizer_json(rng, folder):
    """The description of a recognizer."""
    edit(rng, folder / "new/recognizer.json")
    sign(folder / "new")
    return lambda: load(folder / "new")


def hyperparams_yaml(rng, folder):
    """That of an older folder."""
    path = folder / "old/hyperparams.yaml"
    data = path.read_bytes()
    if rng.randrange(3):
        text = reworded(rng, data.decode())
        path.write_bytes(text.encode("utf-8", "replace"))
    else:
        path.write_bytes(spoiled(rng, data))
    return lambda: load(folder / "old")


def read_weights(folder):
    """All of a weights file, its integer weights too."""
    checkpoint = load_checkpoint(folder)
    for layer in checkpoint.integers.values():
        layer.loaded()


def plan_json(rng, folder):
    """A plan, alone or as a part of a signed folder."""
    edit(rng, folder / "new/plan.json")
    sign(folder / "new")
    if rng.randrange(2):
        return lambda: QuantizationPlan.load(folder / "new/plan.json")
    return lambda: read_weights(folder / "new")


def description(rng, folder):
    """What model.safetensors says about itself, signed again."""

    def change(about, tensors):
        new = changed(rng, about)
        about.clear()
        about.update(new if isinstance(new, dict) else {"files": {}})
        name = rng.choice(sorted(tensors))
        kind = rng.randrange(6)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensors[name].reshape(-1)[:-1].clone()
        elif kind == 2:
            tensors[name] = tensors[name].double() * math.nan

    sign(folder / "new", change)
    return lambda: read_weights(folder / "new")


def header(rng, folder):
    """The header of model.safetensors."""
    path = folder / "new/model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    rows = changed(rng, json.loads(data[8 : 8 + size]))
    text = json.dumps(rows).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return lambda: read_weights(folder / "new")


def damaged(rng, folder):
    """Any file of a folder, with checksums that tell."""
    files = sorted(path for path in (folder / "new").iterdir())
    path = rng.choice(files)
    kind = rng.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(spoiled(rng, path.read_bytes()))
    return lambda: load(folder / "new")


def plan_safetensors(rng, folder):
    """Tensors beside a plan."""
    path = folder / "other/plan.safetensors"
    data = path.read_bytes()
    if rng.randrange(2):
        tensors, metadata = bytes_to_tensors(data)
        about = changed(rng, json.loads(metadata["description"]))
        if rng.randrange(3) == 0:
            name = rng.choice(sorted(tensors))
            tensors[rng.choice(NAMES[1:])] = tensors.pop(name)
        data = tensors_to_bytes(tensors, {"description": json.dumps(about)})
        path.write_bytes(data)
    else:
        path.write_bytes(spoiled(rng, data))
    return lambda: read_tensors(path, file_digest(path))


def remembered(rng, folder):
    """Values of a store, with digests that are right."""
    store = Store(folder / "other")
    name, read = rng.choice(
        [
            (
                "histograms.json",
                lambda: store.read(
                    "histograms.json",
                    "k",
                    "calibration histograms",
                    lambda raw: Calibration.from_dict(raw, ["enc"], 128),
                ),
            ),
            (
                "transcripts.json",
                lambda: Evaluation.read(store, "transcripts.json", "k"),
            ),
            (
                "effort.json",
                lambda: Effort(1.0, {}).remembered(store, "effort.json", "k"),
            ),
        ]
    )
    path = folder / "other" / name
    record = json.loads(path.read_text(encoding="utf-8"))
    if rng.randrange(4):
        content = changed(rng, record["content"])
        try:
            store.write(name, "k", content)
            store._unwritten.clear()
        except (ValueError, RecursionError):
            write_json(path, {**record, "content": content})
    else:
        path.write_bytes(spoiled(rng, path.read_bytes()))
    return read


def journal(rng, folder):
    """The journal of a search, with and without digests."""
    path = folder / "other/search.jsonl"
    rows = path.read_bytes().splitlines()
    place = rng.randrange(len(rows))
    if rng.randrange(3):
        row = json.loads(rows[place])
        del row["check"]
        rows[place] = json.dumps(changed(rng, row)).encode()
    else:
        rows[place] = spoiled(rng, rows[place])
    path.write_bytes(b"\n".join(rows) + rng.choice([b"", b"\n"]))
    return lambda: Journal(Store(folder / "other"), "k")


def plain_json(rng, folder):
    """Any JSON file."""
    path = folder / "any.json"
    if rng.randrange(2):
        write_json(path, odd(rng))
    else:
        path.write_bytes(spoiled(rng, b'{"a": [1, 2.5, "\\u00e9"], "b": null}'))
    return lambda: read_json(path, "file")


BLOCK = {
    "target": ["wav2vec2", "enc"],
    "include": ["*"],
    "weight_bits": 8,
    "activation_bits": 8,
    "method": "stablequant",
    "calibration": {"num_utterances": 4, "num_bins": 128, "percentile": 99.9},
    "search": {"num_utterances": 6, "cutoffs": [100, 99.9], "level": 0.8},
    "adaround": {"iterations": 3, "lr": 0.1, "calibrator": "mse"},
    "plus": {"strengths": [0.5], "budget": {"size": 0.2, "bits": [4, 8]}},
    "qat": {"epochs": 1, "lr": 1e-5, "keep": "best"},
    "plan": "plan.json",
    "backend": "torch_int8",
    "backend_options": {"threads": 2},
    "output_folder": "out",
    "seed": 3,
    "sample_rate": 16000,
    "require_checkpoint": True,
    "variants": [{"name": "a", "method": "max"}, {"name": "b"}],
}


def block(rng, folder):
    """The block of a recipe."""
    made = changed(rng, BLOCK)
    rows = made if isinstance(made, dict) else {"target": made}
    return lambda: speechbrain_stablequant.register(**rows)


TARGETS = [
    *(config_json, labels, recognizer_json, hyperparams_yaml, plan_json),
    *(description, header, damaged, plan_safetensors, remembered, journal),
    *(plain_json, block),
]
EXAMPLES = int(os.environ.get("STABLEQUANT_FUZZ_EXAMPLES", DEFAULT))


@pytest.mark.parametrize("target", TARGETS, ids=lambda f: f.__name__)
@settings(
    max_examples=math.ceil(EXAMPLES / len(TARGETS)),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**64 - 1))
def test_every_reader(target, base, watch, tmp_path_factory, seed):
    """Gives a value, or one line."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    reader = target(random.Random(seed), folder)
    check(reader, folder, watch)


def test_the_watch_sees(watch, tmp_path):
    """What these tests look for is found when it is there."""
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside"

    def fails(reader, message):
        with pytest.raises(AssertionError, match=message):
            check(reader, inside, watch)

    def raises(error):
        def reader():
            raise error

        return reader

    with pytest.raises(KeyError):
        check(raises(KeyError("a")), inside, watch)
    fails(raises(ValueError("not from the package")), "test_readers_fuzz")
    fails(lambda: json.loads("{"), "JSONDecodeError")
    fails(lambda: (tmp_path / "outside").write_text("a"), "outside")
    fails(lambda: os.mkdir(tmp_path / "made"), r"os\.mkdir")
    check(lambda: (inside / "file").write_text("a"), inside, watch)
    check(lambda: read_json(inside / "none", "plan"), inside, watch)
    gc.collect()
