"""The recipe's comparison with modelopt's scores; modelopt is a stand-in."""

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

STAND_IN = '''
from torch import nn


def auto_quantize(
    model, constraints, quantization_formats, data_loader, forward_step,
    loss_func, disabled_layers, num_calib_steps, num_score_steps,
):
    """Scores each layer by its gradient; queries, keys and values together."""
    for batch in data_loader:
        loss_func(forward_step(model, batch), batch).backward()
    groups = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            if name not in (disabled_layers or []):
                parent, _, last = name.rpartition(".")
                key = parent if last in ("q_proj", "k_proj", "v_proj") else name
                groups.setdefault(key, []).append(name)
    bits = [
        entry["cfg"]["num_bits"]
        for row in quantization_formats
        for entry in row["quant_cfg"]
        if entry["quantizer_name"] == "*weight_quantizer"
    ]
    stats = {}
    for key, names in groups.items():
        total = sum(float(
            model.get_submodule(name).weight.grad.pow(2).sum()
        ) for name in names)
        scores = [total / 4**b for b in bits] + [0.0]
        stats[key] = {"module_names": names, "scores": scores}
    return model, {"candidate_stats": stats}
'''


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder from which ``modelopt`` is imported."""
    folder = tmp_path_factory.mktemp("modelopt")
    package = folder / "modelopt" / "torch" / "quantization"
    package.mkdir(parents=True)
    for path in (package.parents[1], package.parent):
        (path / "__init__.py").touch()
    (package / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def compare(script, stand_in):
    if importlib.util.find_spec("modelopt") is not None:
        pytest.skip("the stand-in is for where modelopt is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(stand_in))
        yield script("compare_modelopt")
    for name in [n for n in sys.modules if n.partition(".")[0] == "modelopt"]:
        del sys.modules[name]


class Frozen(nn.Module):
    """A module that computes without gradients, as SpeechBrain's wrapper."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.freeze = True

    def forward(self, *args):
        if self.freeze:
            with torch.no_grad():
                return self.module(*args)
        return self.module(*args)


def test_scores_of_a_frozen_encoder(compare, make_tiny_modules):
    modules = dict(make_tiny_modules("wav2vec2-large").items())
    modules["wav2vec2"] = Frozen(modules["wav2vec2"])
    layers = {
        f"{key}.{name}" if name else key
        for key, module in modules.items()
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear | nn.Conv1d)
    }
    left_out = min(layers)
    batches = [(torch.randn(1, n),) for n in (900, 1100)]
    with torch.no_grad():
        output = nn.Sequential(*modules.values())(*batches[-1])
    rest = (layers - {left_out}, [4, 8], 8, 0)
    found = compare.auto_quantize_scores(
        modules, batches, output.log_softmax(-1), *rest
    )
    with pytest.raises(ValueError, match=r"^quantize\.target: wav2vec2, enc"):
        compare.auto_quantize_scores(modules, batches, output, *rest)
    assert set(found) == layers - {left_out}
    for name, row in found.items():
        if name.endswith(("k_proj", "v_proj", "q_proj")):
            # Of these three the first has the score of all.
            continue
        assert row[4] > row[8] > 0, name
    assert modules["wav2vec2"].freeze


def test_copies_compute_the_same(compare, make_tiny_modules):
    """Weight norm and all, and the recipe's modules stay as they are."""
    modules = dict(make_tiny_modules("hubert-large").items())
    wavs = torch.randn(2, 1000)
    with torch.no_grad():
        expected = nn.Sequential(*modules.values())(wavs).log_softmax(-1)
    calls = compare.Calls(modules)
    torch.testing.assert_close(calls((wavs,)), expected, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in calls.parameters())
    with torch.no_grad():
        again = nn.Sequential(*modules.values())(wavs).log_softmax(-1)
    assert torch.equal(again, expected)


def test_a_layer_without_a_score(compare):
    with pytest.raises(ValueError, match="b: modelopt gives no score"):
        compare.by_layer(
            {"x": {"module_names": ["a"], "scores": [1.0]}}, {"a", "b"}, [4]
        )


@pytest.mark.slow
def test_comparison(run, few, stand_in, tmp_path):
    done = run(
        tmp_path / "out",
        *("--data_folder", few),
        "--quantize",
        "{calibration: {num_utterances: 4}, search: {num_utterances: 4}}",
        script="compare_modelopt.py",
        hparams="hparams/compare_modelopt.yaml",
        PYTHONPATH=str(stand_in),
    )
    assert done.code == 0, done.out + done.err
    folder = tmp_path / "out" / "quantized"
    table = json.loads((folder / "comparison.json").read_text("utf-8"))
    names = [row["variant"] for row in table["rows"]]
    assert names == ["divergence", "modelopt"]
    for row in table["rows"]:
        # Beside the weights that the budget counts: the probe, and headers.
        assert row["size_mb"] <= 0.19 * table["float_mb"] + 0.16
    for name in names:
        plan = json.loads((folder / name / "plan.json").read_text("utf-8"))
        parts = plan["search"]["parts"]
        (part,) = [p for p in parts if p["part"] == "budget"]
        assert part["scores"] == name
