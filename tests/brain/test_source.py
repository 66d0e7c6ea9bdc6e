"""Sources are read as data before anything of them is constructed."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from speechbrain_stablequant.brain import source as source_module
from speechbrain_stablequant.brain.source import (
    SourceError,
    allowed,
    check_source,
    load_source,
    source_folder,
)

YAML = """\
blank_index: 0
linear: !new:torch.nn.Linear {in_features: 1, out_features: 2}
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    linear: !ref <linear>
modules:
    encoder: !ref <encoder>
tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: !ref <blank_index>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        linear: !ref <linear>
"""


def make_source(folder: Path, more: str = "", yaml: str = YAML) -> Path:
    """A source of one layer, with more lines in its YAML."""
    (folder / "hyperparams.yaml").write_text(yaml + more, encoding="utf-8")
    torch.save(torch.nn.Linear(1, 2).state_dict(), folder / "linear.ckpt")
    return folder


def test_source_loads(tmp_path):
    folder = make_source(tmp_path)
    assert check_source(folder, False) == "EncoderASR"
    load = torch.load
    with allowed(folder, False):
        found = load_source(folder, "EncoderASR", {})
    saved = torch.load(folder / "linear.ckpt")
    assert torch.equal(found.mods.encoder["linear"].weight, saved["weight"])
    assert torch.load is load


@pytest.mark.parametrize(
    "name",
    [
        "speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2",
        "speechbrain.integrations.huggingface.whisper.Whisper",
        "speechbrain.lobes.models.CRDNN.CRDNN",
        "speechbrain.lobes.models.transformer.TransformerASR.TransformerASR",
        "speechbrain.decoders.S2SRNNBeamSearcher",
        "speechbrain.decoders.scorer.ScorerBuilder",
        "speechbrain.processing.features.InputNormalization",
        "sentencepiece.SentencePieceProcessor",
        "torch.nn.functional.gelu",
    ],
)
def test_parts_of_models(tmp_path, name):
    folder = make_source(tmp_path, f"part: !name:{name}\n")
    assert check_source(folder, False) == "EncoderASR"


@pytest.mark.parametrize("value", ["!tuple (3, -0.5)", "(8, 10, 80)"])
def test_plain_tuples(tmp_path, value):
    folder = make_source(tmp_path, f"part: {value}\n")
    assert check_source(folder, False) == "EncoderASR"


#: Each would run a shell command, or code of the source.
ATTACKS = [
    "x: !apply:os.system [touch RAN]",
    "x: !apply:torch.os.system [touch RAN]",
    "x: !apply:torch.nn.modules.module.torch.os.system [touch RAN]",
    "x: !name:speechbrain.lobes.features.torch.hub.load {repo: y}",
    "x: !apply:speechbrain.utils.superpowers.run_shell [touch RAN]",
    "x: !apply:speechbrain.dataio.dataio.load_pickle [y]",
    "x: !apply:torch.load [y]",
    "x: !new:torch.nn.__builtins__.eval [y]",
    "x: !new:custom.Encoder {}",
    "x: !module:os",
    "x: !module:torch.nn",
    "x: !applyref:os.system [touch RAN]",
    "x: !include:other.yaml",
    "x: !!python/object/apply:os.system [touch RAN]",
    'x: (!!python/object/apply:os.system ["touch RAN"])',
    'x: "(!!python/object/apply:os.system [touch RAN])"',
    'y: "("\nz: "!!python/object/apply:os.system [touch RAN])"\nx: !ref <y><z>',
    "x: !tuple (!!python/object/apply:os.system [touch RAN])",
    """x: !tuple "[!!python/object/apply:os.system ['touch RAN']]\"""",
    "x: !tuple [!!python/object/apply:os.system [touch RAN]]",
    "x: !include:torch.manual_seed",
    "x: !new:speechbrain.augment.time_domain.AddNoise {csv_file: y}",
    "x: !new:speechbrain.tokenizers.SentencePiece.SentencePiece {model_dir: y}",
    "x: !new:torch.manual_seed [1]",
    "x: !name:speechbrain.dataio.encoder.CTCTextEncoder.save {path: RAN}",
    "x: {source: y, settings: [[trust_remote_code, True]]}",
    "x: !ref <encoder.__init__>",
    "x: !new:speechbrain.integrations.huggingface.mert.MERT {source: y}",
    "x: {source: y, trust_remote_code: True}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    folder = make_source(tmp_path, attack + "\n")
    included = "y: !applyref:os.system [touch RAN]\n"
    (folder / "torch.manual_seed").write_text(included, encoding="utf-8")
    with pytest.raises(SourceError, match="trust_source=True") as caught:
        check_source(folder, False)
    assert "\n" not in str(caught.value)
    assert not Path("RAN").exists()
    assert check_source(folder, True) == "EncoderASR"
    assert not Path("RAN").exists()


def test_custom_code(tmp_path):
    yaml = YAML.replace("!new:torch.nn.Linear", "!new:custom_of_test.Own")
    folder = make_source(tmp_path, yaml=yaml)
    code = "import torch\nclass Own(torch.nn.Linear):\n    pass\n"
    (folder / "custom_of_test.py").write_text(code, encoding="utf-8")
    with pytest.raises(SourceError, match=r"!new:custom_of_test\.Own"):
        check_source(folder, False)
    kind = check_source(folder, True)
    with allowed(folder, True):
        found = load_source(folder, kind, {})
    assert type(found.mods.encoder["linear"]).__name__ == "Own"
    (folder / "custom.py").write_text(code, encoding="utf-8")
    make_source(folder)
    with pytest.raises(SourceError, match=r"custom\.py is code of its own"):
        check_source(folder, False)


class Command:
    """Pickled, it runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


def test_pickled_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = make_source(tmp_path)
    torch.save({"weight": Command()}, folder / "linear.ckpt")
    kind = check_source(folder, False)
    load = torch.load
    with (
        pytest.raises(SourceError, match="holds more than tensors") as caught,
        allowed(folder, False),
    ):
        load_source(folder, kind, {})
    assert "linear.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("RAN").exists()
    assert torch.load is load


MODULES = "modules: {modules}\ntokenizer: x\n{keys}: x\n"


@pytest.mark.parametrize(
    ("modules", "keys", "kind"),
    [
        ("{encoder: 1}", "decoding_function", "EncoderASR"),
        ("{encoder: 1, decoder: 2}", "lm", "EncoderDecoderASR"),
        ("{encoder: 1, decoder: 2}", "decoding_function", "EncoderDecoderASR"),
        ("{whisper: 1, decoder: 2}", "sample_rate: 8\nlanguage", "WhisperASR"),
    ],
)
def test_classes(tmp_path, modules, keys, kind):
    yaml = MODULES.format(modules=modules, keys=keys)
    assert check_source(make_source(tmp_path, yaml=yaml), False) == kind


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        (MODULES.format(modules="{enc: 1}", keys="x"), "its modules are enc"),
        ("a: 1\n", "its modules are missing"),
        ("- 1\n", "its modules are missing"),
        ("a: [", "cannot be read"),
        (YAML + "make_decoder_streaming_context: x\n", "of a StreamingASR"),
        (
            YAML + "x: !new:speechbrain_stablequant.inference.FolderLoader\n",
            "is quantized already",
        ),
    ],
)
def test_wrong_sources(tmp_path, yaml, line):
    folder = make_source(tmp_path, yaml=yaml)
    with pytest.raises(SourceError, match=line) as caught:
        check_source(folder, False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./hub", "a/b/hub", "nowhere/", "my model"])
def test_a_folder_that_is_not_there(tmp_path, monkeypatch, name):
    """No name of a model: the Hub is not asked, and not mentioned as cause."""
    monkeypatch.chdir(tmp_path)
    for source in (name, tmp_path / name):
        with pytest.raises(SourceError) as caught:
            source_folder(source)
        text = str(caught.value)
        assert text.startswith(f"source: {source}: there is no such folder; ")
        assert "Repo id" not in text and "\n" not in text
        assert "give a folder in the layout" in text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that cannot be reached, and an empty cache; ``offline`` or not."""

    def changed(offline: bool) -> str:
        for name, value in {
            "HF_HUB_OFFLINE": offline,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "ENDPOINT": "http://127.0.0.1:9",
        }.items():
            monkeypatch.setattr(constants, name, value)
        return f"the cache {tmp_path / 'cache'} has no whole copy"

    return changed


@pytest.mark.parametrize(
    "offline, line",
    [
        (True, "; unset HF_HUB_OFFLINE to download it, or give a folder in"),
        (
            False,
            ", and http://127.0.0.1:9 cannot be reached; check the network or "
            "try again later, or give a folder in",
        ),
    ],
)
def test_a_source_without_a_network(hub, offline, line):
    """What was looked for, where, and what to do; nothing of a library's."""
    place = hub(offline)
    with pytest.raises(SourceError) as caught:
        source_folder("no/such-model")
    start = "source: no/such-model: there is no such folder, and "
    assert str(caught.value).startswith(f"{start}{place}{line}")
    assert "Error" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error, line",
    [
        (
            RepositoryNotFoundError(
                "404", response=SimpleNamespace(headers={}, request=None)
            ),
            ", and https://hub shows you no such model; correct the name, log "
            "in (`hf auth login`) if it is private or gated, or give a folder",
        ),
        (
            OSError(28, "No space left on device"),
            ", and it cannot be downloaded from https://hub (OSError: [Errno "
            "28] No space left on device); correct that, or give a folder",
        ),
    ],
)
def test_a_source_that_the_hub_does_not_give(monkeypatch, error, line):
    def refuse(source: str) -> None:
        raise error

    monkeypatch.setattr(source_module, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
    with pytest.raises(SourceError) as caught:
        source_folder("some/model")
    start = "source: some/model: there is no such folder"
    assert str(caught.value).startswith(f"{start}{line}")


def test_a_model_that_a_source_names(tmp_path, hub):
    """Of a folder that was copied to a machine without a network."""
    place = hub(True)
    more = (
        "wrapped: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2\n"
        "    source: some/checkpoint\n"
        "    save_path: null\n"
    )
    folder = make_source(tmp_path, more)
    with pytest.raises(SourceError) as caught:
        load_source(folder, "EncoderASR", {})
    assert str(caught.value) == (
        f"source: {folder / 'hyperparams.yaml'} names some/checkpoint, which "
        f"is no folder or file here, and {place}; unset HF_HUB_OFFLINE to "
        "download it, or write a path"
    )
    paths = "    paths: {linear: some/model/linear.ckpt}\n"
    folder = make_source(tmp_path, paths)
    with pytest.raises(SourceError, match=r"names some/model/linear\.ckpt, wh"):
        load_source(folder, "EncoderASR", {})


def test_no_source(tmp_path):
    with pytest.raises(SourceError, match="is a file; give its folder"):
        source_folder(__file__)
    with pytest.raises(SourceError, match=r"has no hyperparams\.yaml"):
        check_source(tmp_path, False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"make_hub_folder\.py OUT --check"):
        check_source(tmp_path, False)
