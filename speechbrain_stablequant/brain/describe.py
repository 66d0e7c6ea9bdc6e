"""Describes what a recipe computes, for its inference folder.

A recipe's computation is code, so it is verified, not guessed: its modules are
observed on one batch, rebuilt from their description, and compared with their
outputs.
"""

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from torch import nn

from ..config import CommonConfig
from ..folder.encoder_config import check_config, empty_encoder
from ..folder.errors import NoFolderError
from ..folder.recognizer_spec import RecognizerSource
from ..model.wrapper import WRAPPER_SETTINGS, StoredEncoder
from .data import audio_of
from .decoding import describe_tokenizer, required_tokenizer
from .passes import Call, observe, same
from .recipe_yaml import dumped, makes_calls, plain_node, recipe_tree, tag_of


def describe_recognizer(
    brain: sb.Brain, batch: Any, config: CommonConfig, names: Iterable[str]
) -> RecognizerSource:
    """Describe a Brain's recognizer from any batch; ``names``: its quantized
    layers. Raises a NoFolderError that says what cannot be rebuilt."""
    modules = _keyed_modules(brain, config.target)
    calls = observe(brain, batch, modules)
    wavs, _ = audio_of(batch, config.signal)
    _check_chain(calls, wavs.to(brain.device))
    first, *rest = calls
    keys = tuple(call.key for call in calls)
    for name in names:
        if name.partition(".")[0] not in keys:
            raise NoFolderError(
                f"layer '{name}' was not used: the recipe calls "
                f"{', '.join(keys)}"
            )
    nodes = (recipe_tree(brain) or {}).get("modules") or {}
    tokenizer = required_tokenizer(brain)
    encoder, settings = _describe_encoder(first, modules[first.key], brain)
    stored = describe_tokenizer(tokenizer)
    return RecognizerSource(
        encoder=encoder,
        config=settings,
        heads={
            call.key: _describe_head(call, modules[call.key], nodes, brain)
            for call in rest
        },
        tokenizer_class=stored.kind,
        tokenizer_file=stored.file,
        tokenizer=stored.content,
        blank_index=_blank_index(brain, tokenizer),
        sample_rate=config.sample_rate,
    )


def _keyed_modules(
    brain: sb.Brain, target: Iterable[str]
) -> dict[str, nn.Module]:
    """The Brain's modules, each once, by the key that names its layers."""
    every = dict(brain.modules.items())
    keyed: dict[nn.Module, str] = {}
    for key in (*target, *every):
        keyed.setdefault(every[key], key)
    return {key: module for module, key in keyed.items()}


def _check_chain(calls: list[Call], wavs: torch.Tensor) -> None:
    """Raise unless each module is called once, on the previous output."""
    if not calls:
        raise NoFolderError("the recipe calls none of its `modules`")
    for call in calls:
        if sum(other.key == call.key for other in calls) > 1:
            raise NoFolderError(f"the recipe calls '{call.key}' repeatedly")
    if not (calls[0].inputs and same(calls[0].inputs[0], wavs)):
        raise NoFolderError(
            f"'{calls[0].key}' gets something other than the audio: the "
            "recipe changes it first"
        )
    for before, after in itertools.pairwise(calls):
        if len(after.inputs) != 1 or not same(*after.inputs, before.output):
            raise NoFolderError(
                f"'{after.key}' gets something other than the output of "
                f"'{before.key}'"
            )


def _check_rebuilt(
    call: Call, rebuilt: nn.Module, args: tuple, brain: sb.Brain, what: str
) -> None:
    """Raise unless a rebuilt module gives the observed output."""
    # In the recipe's precision, as observed. Not around more than this call:
    # autocast caches the weights that it casts first.
    with torch.no_grad(), brain.evaluation_ctx:
        output = rebuilt(*args)
    if not all(isinstance(x, torch.Tensor) for x in (output, call.output)):
        raise NoFolderError(f"'{call.key}' does not give one tensor")
    if output.shape != call.output.shape or not torch.allclose(
        output.float(), call.output.float(), rtol=1e-4, atol=1e-4
    ):
        raise NoFolderError(
            f"'{call.key}' gives something other than {what}; its code or "
            "its settings were changed"
        )


def _describe_encoder(
    call: Call, wrapper: nn.Module, brain: sb.Brain
) -> tuple[dict, str]:
    """Settings of the wrapper and ``config.json`` of its model, verified."""
    if not isinstance(wrapper, Wav2Vec2):
        raise NoFolderError(
            f"'{call.key}' is a {type(wrapper).__name__}, not SpeechBrain's "
            "Wav2Vec2 with a HuggingFace model"
        )
    lengths = [arg for arg in call.inputs[1:] if arg is not None]
    settings = {name: getattr(wrapper, name) for name in WRAPPER_SETTINGS}
    config = json.loads(wrapper.model.config.to_json_string(use_diff=False))
    # A folder does not reveal where its model came from.
    config.pop("_name_or_path", None)
    config = check_config(config)
    model = _rebuild_model(wrapper.model, config, f"{call.key}.model")
    rebuilt = StoredEncoder(model, **settings).eval()
    args = (call.inputs[0], *lengths)
    what = "SpeechBrain's wrapper of the model that its configuration describes"
    _check_rebuilt(call, rebuilt, args, brain, what)
    settings = {"key": call.key, "use_lengths": bool(lengths), **settings}
    return settings, json.dumps(config, indent=1, sort_keys=True) + "\n"


def _rebuild_model(
    model: nn.Module, config: Mapping[str, Any], path: str
) -> nn.Module:
    """Build a model from its configuration, with the tensors of ``model``."""
    rebuilt = empty_encoder(config)
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    expected = {n: tensor.shape for n, tensor in rebuilt.state_dict().items()}
    if shapes != expected:
        raise NoFolderError(
            f"the encoder ({type(model).__name__}) is not the model that its "
            "configuration describes"
        )
    described = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        other = described.get(name)
        if other is None or _settings(module) != _settings(other):
            found = "nothing" if other is None else _settings(other)
            raise NoFolderError(
                f"'{path}.{name}' is {_settings(module)}, and the model's "
                f"configuration describes {found}"
            )
    rebuilt.load_state_dict(state, assign=True)
    return rebuilt


def _settings(module: nn.Module) -> str:
    """Class and settings of a module that matter in evaluation."""
    name = type(module).__name__
    # Dropout does nothing in evaluation.
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return name
    return f"{name}({module.extra_repr()})"


def _describe_head(
    call: Call, module: nn.Module, nodes: Mapping[str, Any], brain: sb.Brain
) -> str:
    """YAML that rebuilds a module, ``key: !new:...``, verified."""
    for name, child in module.named_modules(prefix=call.key):
        if getattr(child, "max_norm", None) is not None:
            raise NoFolderError(f"'{name}' has a max_norm: it needs its floats")
    node = plain_node(module)
    if node is None:
        # A copy has no anchors that other nodes refer to.
        node = copy.deepcopy(nodes.get(call.key))
    if not tag_of(node).startswith("!new:") or makes_calls(node):
        raise NoFolderError(
            f"'{call.key}' ({type(module).__name__}) has no `!new:` node in "
            "the hyperparams.yaml of the recipe's output_folder; write it as "
            "one in the recipe's YAML"
        )
    text = dumped({call.key: node})
    rebuilt = load_hyperpyyaml(text)[call.key]
    try:
        rebuilt.load_state_dict(module.state_dict())
    except RuntimeError as error:
        raise NoFolderError(
            f"'{call.key}' does not have the parameters of its YAML node: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    rebuilt.to(brain.device).eval()
    _check_rebuilt(call, rebuilt, call.inputs, brain, "its YAML node")
    return text


def _blank_index(brain: sb.Brain, tokenizer: Any) -> int:
    index = getattr(brain.hparams, "blank_index", None)
    if index is None and hasattr(tokenizer, "blank_label"):
        index = tokenizer.get_blank_index()
    if not isinstance(index, int) or isinstance(index, bool):
        raise NoFolderError(
            "the recipe has no key `blank_index`, and its tokenizer no blank"
        )
    return index
