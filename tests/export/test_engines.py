"""The folders that other engines load, in these engines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quantized_folder
import soundfile
import torch
from speechbrain.decoders import ctc_greedy_decode

from speechbrain_stablequant.export import ENGINES, engines, export_for
from speechbrain_stablequant.runtimes.cpu import CpuClass, cpu_class
from speechbrain_stablequant.transcribe.load import load

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("openvino", reason="needs the extra cpu")

RATE = 16000


@pytest.fixture(scope="module")
def folder(make_tiny_modules, tmp_path_factory) -> Path:
    torch.manual_seed(7)
    modules = make_tiny_modules("wav2vec2-large")
    with torch.no_grad():
        x = modules["wav2vec2"](torch.randn(4, 9000), torch.ones(4))
        # So that no label is the likeliest of all frames of any noise.
        head = modules["ctc_lin"]
        head.w.bias -= head(modules["enc"](x)).mean((0, 1))
    place = tmp_path_factory.mktemp("engines") / "quantized"
    quantized_folder.write(place, modules)
    return place


@pytest.fixture(scope="module")
def spoken(folder) -> tuple[list[Path], list[str]]:
    """Audio files, and what the folder's own runtime recognizes."""
    recognizer = load(folder, "onnx")
    files = [folder.parent / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(files):
        torch.manual_seed(i)
        wave = 0.1 * torch.randn(6000 + 3000 * i)
        soundfile.write(path, wave.numpy(), RATE, subtype="FLOAT")
    texts = [recognizer.transcribe_file(path) for path in files]
    assert any(texts)
    return files, texts


@pytest.fixture(scope="module")
def exported(folder):
    """The folder of each engine, with the weights that this CPU executes: a
    model of random weights recognizes something else with others."""
    bits = 8 if cpu_class().exact else 7

    def made(target: str) -> Path:
        out = folder.parent / target
        return out if out.exists() else export_for(folder, out, target, bits)

    return made


def run_readme(folder: Path, path: Path, more: str = "") -> str:
    """What the README's code, and more of it, prints for an audio file."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("```python\n")
    code = rest.partition("```")[0].replace("speech.wav", str(path))
    # Some CPUs would compute in bfloat16, as the folder's runtime does not.
    exact = '"CPU", {"INFERENCE_PRECISION_HINT": "f32"}'
    code = code.replace('"CPU"', exact)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\n{more}\nimport sys\n"
            "assert not {'torch', 'speechbrain'} & set(sys.modules)",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_readme_recognizes(folder, exported, spoken, target):
    """Random weights see the last bit of the audio: 1e-4 of noise moves the
    answer by up to 0.002 of its norm, one wrong scale by 0.007 or more."""
    recognizer, saved = load(folder, "onnx"), folder.parent / "logits.npy"
    files, _ = spoken
    for path in files[1:]:
        more = f"import numpy; numpy.save({str(saved)!r}, logits)"
        said = run_readme(exported(target), path, more).strip()
        found = torch.from_numpy(np.load(saved)).log_softmax(-1)
        wave = recognizer.load_audio(path)[None]
        expected = recognizer.encode_batch(wave, torch.ones(1))
        assert (found - expected).norm() < 0.004 * expected.norm()
        (tokens,) = ctc_greedy_decode(found, torch.ones(1), blank_id=0)
        assert said == recognizer.text(tokens).strip() != ""


def test_sherpa_onnx(exported, spoken):
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is not installed")
    files, _ = spoken
    for path in files[1:]:
        wave, _ = soundfile.read(path, dtype="float32")
        # The engine does so, and a model of random weights sees the last bit.
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-5)
        soundfile.write(path.with_suffix(".flat.wav"), wave, RATE, "FLOAT")
        flat = path.with_suffix(".flat.wav")
        found = run_readme(exported("sherpa-onnx"), path)
        assert (
            found.strip() == run_readme(exported("onnxruntime"), flat).strip()
        )


def test_sherpa_onnx_normalizes(make_tiny_modules, tmp_path):
    settings = {**quantized_folder.SETTINGS, "normalize_wav": False}
    modules = make_tiny_modules("wav2vec2-large")
    quantized_folder.write(tmp_path / "raw", modules, encoder=settings)
    with pytest.raises(ValueError, match="normalize_wav: False"):
        export_for(tmp_path / "raw", tmp_path / "out", "sherpa-onnx")


@pytest.mark.skipif(
    "TRANSFORMERS_JS" not in os.environ,
    reason="TRANSFORMERS_JS names no folder with Node's package "
    "@huggingface/transformers",
)
def test_transformers_js(exported, spoken, tmp_path):
    out = exported("transformers.js")
    files, texts = spoken
    shutil.copytree(out, tmp_path / out.name)
    text = (out / "README.md").read_text(encoding="utf-8")
    code = text.partition("```js\n")[2].partition("```")[0]
    code = code.replace('".."', json.dumps(str(tmp_path)))
    for path, expected in zip(files, texts, strict=True):
        wave, _ = soundfile.read(path, dtype="float32")
        samples = f"const samples = new Float32Array({wave.tolist()});\n"
        script = Path(os.environ["TRANSFORMERS_JS"]) / "stablequant_test.mjs"
        script.write_text(f"{samples}{code}\nconsole.log(text);\n")
        done = subprocess.run(
            ["node", str(script)], capture_output=True, text=True, timeout=300
        )
        script.unlink()
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == expected.split()


def test_tokenizer_of_transformers_js(exported):
    """HuggingFace's own library reads it, and decodes as CTC does."""
    tokenizers = pytest.importorskip("tokenizers")
    path = exported("transformers.js") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    blank, space, a, b = (
        tokenizer.token_to_id(x) for x in ("<pad>", "|", "A", "B")
    )
    ids = [blank, a, a, blank, a, space, space, blank, b, b]
    assert tokenizer.decode(ids) == "AA B"


@pytest.mark.parametrize("target", [x for x in ENGINES if x != "tensorrt"])
def test_weights_of_seven_and_of_eight_bits(folder, tmp_path, target):
    sizes = {}
    for bits in (7, 8):
        out = export_for(folder, tmp_path / str(bits), target, bits)
        assert f"Weights of {bits} bits" in (out / "README.md").read_text()
        sizes[bits] = {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
    assert sizes[7].keys() == sizes[8].keys()
    assert sizes[7] != sizes[8]
    assert {x.name for x in tmp_path.iterdir()} == {"7", "8"}


@pytest.mark.parametrize(
    "target, bits, said",
    [
        ("sherpa-onnx", None, True),
        ("sherpa-onnx", 7, False),
        ("sherpa-onnx", 8, False),
        ("onnxruntime", None, True),
        ("tensorrt", None, False),
    ],
)
def test_a_line_says_that_weights_have_seven_bits(
    folder, tmp_path, caplog, target, bits, said
):
    out = export_for(folder, tmp_path / "out", target, bits)
    lines = [x for x in caplog.messages if "rounded from 8 bits to 7" in x]
    assert len(lines) == said
    assert all(x.startswith(f"{out}: ") and "\n" not in x for x in lines)
    assert all("--weight-range 8 keeps them" in x for x in lines)


@pytest.mark.parametrize("vnni", [True, False])
def test_the_line_says_whether_this_cpu_is_exact_with_eight(
    folder, tmp_path, caplog, monkeypatch, vnni
):
    here = CpuClass("avx512_vnni" if vnni else "avx2")
    monkeypatch.setattr(engines, "cpu_class", lambda: here)
    export_for(folder, tmp_path / "out", "onnxruntime")
    (line,) = [x for x in caplog.messages if "--weight-range 8" in x]
    assert line.endswith(" (this CPU is one)") == vnni


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("target", ENGINES)
def test_each_readme_says_where_it_is_exact(folder, tmp_path, target, bits):
    out = export_for(folder, tmp_path / "out", target, bits)
    text = (out / "README.md").read_text(encoding="utf-8")
    if target == "tensorrt":
        assert "GPUs add up products in 32 bits" in text
        return
    assert "exact on ARM and on x86 CPUs with VNNI" in text
    assert ("may change a transcript" in text) == (bits == 7)
    assert ("saturate in silence" in text) == (bits == 8)
    assert ("for browsers keep 7" in text) == (target == "transformers.js")


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: exists"):
        export_for(folder, tmp_path, "openvino")
    with pytest.raises(ValueError, match="weight_range: 6"):
        export_for(folder, tmp_path / "out", "openvino", 6)
    with pytest.raises(ValueError, match="there is no such folder"):
        export_for(tmp_path / "none", tmp_path / "out", "openvino")
    assert not list(tmp_path.iterdir())
