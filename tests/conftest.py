"""Tiny random HuggingFace models and paths that many tests share.

Nothing here needs a network. The four models are those that the package is
about, some thousand times smaller: wav2vec 2.0 and HuBERT, each in the shape
of a base model (GroupNorm front end, LayerNorm after each sublayer, no bias
in the convolutions) and of a large one (LayerNorm front end, LayerNorm before
each sublayer, bias in the convolutions).
"""

import os

# Before any import of transformers, which reads it once: a hub id without a
# network costs half a minute of retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Of tests side by side, each has a core. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Where a test computes in two threads, the ones that wait would otherwise
    # spin on the cores that other tests need: ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

import pytest
import torch
from speechbrain.lobes.models.VanillaNN import VanillaNN
from speechbrain.nnet.linear import Linear
from torch import nn
from transformers import (
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from speechbrain_stablequant.core.affine import qmax
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.methods.plus.zero_point import behind_gelu
from speechbrain_stablequant.model.encoders import find_encoders
from speechbrain_stablequant.model.layers import find_layers

# Helpers of several tests.
sys.path[:0] = [str(Path(__file__).resolve().parent)]

from starter import Starter  # noqa: E402

collect_ignore = ["quantized_folder.py", "small_recipes.py", "starter.py"]


@pytest.fixture(scope="session")
def starter(tmp_path_factory):
    """Runs scripts without paying for their imports each time."""
    starter = Starter(tmp_path_factory.mktemp("streams"))
    yield starter
    starter.close()


FAMILIES = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
    "hubert": (HubertConfig, HubertModel),
}
SHAPES = {
    "base": {
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
        "conv_bias": False,
    },
    "large": {
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
}
VARIANTS = [f"{family}-{shape}" for family in FAMILIES for shape in SHAPES]

SIZES = {
    "conv_dim": (16,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}


def tiny_config(variant: str, **overrides):
    """Configuration of a tiny model, one of ``VARIANTS``; ``overrides`` are
    entries that differ."""
    family, shape = variant.split("-")
    kind, _ = FAMILIES[family]
    return kind(**{**SIZES, **SHAPES[shape], **overrides})


def build_tiny_model(variant: str, **overrides) -> PreTrainedModel:
    """A tiny ``Wav2Vec2Model`` or ``HubertModel`` in evaluation mode.

    Its weights are random, from torch's seed, and so large that every layer
    matters to the output. ``overrides`` are entries of the configuration.
    """
    _, kind = FAMILIES[variant.split("-")[0]]
    model = kind(tiny_config(variant, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.endswith("weight") and parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


class TinyWrapper(nn.Module):
    """What SpeechBrain's ``Wav2Vec2`` is around a HuggingFace model.

    Arguments
    ---------
    model : transformers.PreTrainedModel
        The encoder.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, wavs: torch.Tensor, relative=None) -> torch.Tensor:
        """``[batch, time]`` and relative lengths to ``[batch, time, hidden]``,
        as SpeechBrain's wrapper does: an attention mask of the padding."""
        mask = None
        if relative is not None:
            real = (relative * wavs.shape[1]).round()
            mask = torch.arange(wavs.shape[1])[None] < real[:, None]
        return self.model(wavs, attention_mask=mask).last_hidden_state


def build_tiny_modules(variant: str, **overrides) -> nn.ModuleDict:
    """The ``modules`` of a SpeechBrain recipe around a tiny encoder:
    ``wav2vec2`` (:class:`TinyWrapper`), ``enc`` and ``ctc_lin``."""
    encoder = build_tiny_model(variant, **overrides)
    width = encoder.config.hidden_size
    modules = {
        "wav2vec2": TinyWrapper(encoder),
        "enc": VanillaNN([None, None, width], dnn_blocks=2, dnn_neurons=24),
        "ctc_lin": Linear(input_size=24, n_neurons=12),
    }
    return nn.ModuleDict(modules).eval()


def build_lopsided_quants(
    model: PreTrainedModel, bits: tuple[int, int] = (8, 8), amax: float = 3.0
) -> dict[str, LayerQuant]:
    """How a plan with activation offsets quantizes a tiny model.

    Arguments
    ---------
    model : transformers.PreTrainedModel
        The model, behind the key ``w``.
    bits : tuple of int
        Of weights and activations.
    amax : float
        The upper end of all inputs.

    Returns
    -------
    dict
        LayerQuant by layer name: with an offset behind each GELU.
    """
    layers = find_layers({"w": model}, ["w"])
    behind = behind_gelu(find_encoders({"w": model}), layers)
    half = qmax(bits[1])
    below = half // 8
    scale = amax / (2 * half - below)
    moved = LayerQuant(
        *bits, half * scale, activation_offset=(half - below) * scale
    )
    even = LayerQuant(*bits, amax)
    return {x.name: moved if x.name in behind else even for x in layers}


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(1234)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What is remembered of this machine is made anew by each session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Also for the processes that a test starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    """Each of the four kinds of model in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_tiny_model():
    """:func:`build_tiny_model`, for tests that need another one."""
    return build_tiny_model


@pytest.fixture(scope="session")
def make_tiny_modules():
    """:func:`build_tiny_modules`, for tests that need others."""
    return build_tiny_modules


@pytest.fixture
def lopsided_quants():
    """:func:`build_lopsided_quants`."""
    return build_lopsided_quants


@pytest.fixture
def tiny_model(variant) -> PreTrainedModel:
    """Each of the four tiny models in turn."""
    return build_tiny_model(variant)


@pytest.fixture
def tiny_modules(variant) -> nn.ModuleDict:
    """The ``modules`` of a recipe around each of the four tiny models."""
    return build_tiny_modules(variant)
