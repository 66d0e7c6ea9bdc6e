"""Finds out what a recipe computes, so that a folder can hold it.

What a recipe computes is code. So nothing is guessed: one batch is run, the
modules that it calls are seen, and what the folder would rebuild (the chain
of modules, the encoder's wrapper, each head) is compared with what they gave.
A recipe that cannot be described so gets no inference folder, and a reason.
"""

import copy
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml.compat import StringIO
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from speechbrain.nnet.linear import Linear as SpeechBrainLinear
from torch import nn

from ..config import QuantizeConfig
from ..folder.encoder_config import check_config, empty_encoder
from ..folder.write import HYPERPARAMS_FILE, RecognizerSource
from ..model.wrapper import WRAPPER_SETTINGS, StoredEncoder
from .data import audio_of
from .decoding import describe_tokenizer, find_tokenizer

# What plain modules are made from again.
_ARGUMENTS = {
    nn.Identity: (),
    nn.Linear: ("in_features", "out_features"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.BatchNorm1d: ("num_features", "eps", "affine"),
    nn.Dropout: ("p",),
    nn.ReLU: (),
    nn.LeakyReLU: ("negative_slope",),
    nn.GELU: ("approximate",),
    nn.SiLU: (),
    nn.Tanh: (),
    nn.LogSoftmax: ("dim",),
}


class NoFolderError(ValueError):
    """Why a recipe cannot be rebuilt from a folder, in one line."""


@dataclass(frozen=True)
class Call:
    """One call of a module of the Brain.

    Arguments
    ---------
    key : str
        Key of the module.
    args : tuple
        What it was called with, keyword arguments behind.
    output : object
        What it gave.
    """

    key: str
    args: tuple = field(repr=False)
    output: Any = field(repr=False)


def describe_recognizer(
    brain: sb.Brain, batch: Any, config: QuantizeConfig, names: Iterable[str]
) -> RecognizerSource:
    """Finds out what a Brain computes, from one batch.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's, with its float modules.
    batch : PaddedBatch
        Any batch of its data.
    config : QuantizeConfig
        The block.
    names : iterable of str
        Layers that are quantized.

    Returns
    -------
    RecognizerSource

    Raises
    ------
    NoFolderError
        What cannot be rebuilt, and why.
    """
    modules = _keyed_modules(brain, config.target)
    calls = find_chain(brain, batch, config)
    first, *rest = calls
    keys = tuple(call.key for call in calls)
    for name in names:
        if name.partition(".")[0] not in keys:
            raise NoFolderError(
                f"layer '{name}' was not used: the recipe calls "
                f"{', '.join(keys)}"
            )
    wrapper = modules[first.key]
    nodes = _recipe_nodes(brain)
    tokenizer = find_tokenizer(brain)
    if tokenizer is None:
        raise NoFolderError(
            "neither the Brain nor its hparams hold a CTCTextEncoder or a "
            "SentencePiece tokenizer; set brain.tokenizer"
        )
    encoder, encoder_config = _describe_encoder(first, wrapper, brain)
    heads = {
        call.key: _describe_head(call, modules[call.key], nodes, brain)
        for call in rest
    }
    tokenizer_class, tokenizer_file, content = describe_tokenizer(tokenizer)
    return RecognizerSource(
        keys=keys,
        encoder=encoder,
        config=encoder_config,
        heads=heads,
        tokenizer_class=tokenizer_class,
        tokenizer_file=tokenizer_file,
        tokenizer=content,
        blank_index=_blank_index(brain, tokenizer),
        sample_rate=config.sample_rate,
    )


def find_chain(
    brain: sb.Brain, batch: Any, config: QuantizeConfig
) -> list[Call]:
    """The modules that a Brain calls one after the other, from the audio on.

    Arguments
    ---------
    brain : sb.Brain
        The recipe's, with its float modules.
    batch : PaddedBatch
        Any batch of its data.
    config : QuantizeConfig
        The block.

    Returns
    -------
    list of Call
        In order; the input of each is the output of the one before it.

    Raises
    ------
    NoFolderError
        The recipe computes something else.
    """
    calls = _observe(brain, batch, _keyed_modules(brain, config.target))
    _check_chain(calls, batch, config.signal, str(brain.device))
    return calls


def _keyed_modules(
    brain: sb.Brain, target: Iterable[str]
) -> dict[str, nn.Module]:
    """The Brain's modules, each once, under the key that names its layers."""
    every = dict(brain.modules.items())
    order = [*target, *(key for key in every if key not in target)]
    keyed: dict[int, str] = {}
    for key in order:
        keyed.setdefault(id(every[key]), key)
    return {key: every[key] for key in keyed.values()}


@torch.no_grad()
def _observe(
    brain: sb.Brain, batch: Any, modules: Mapping[str, nn.Module]
) -> list[Call]:
    """The calls of the Brain's modules while it recognizes a batch."""
    calls: list[Call] = []

    def hook(key: str):
        def record(module, args, kwargs, output) -> None:
            calls.append(Call(key, (*args, *kwargs.values()), output))

        return record

    brain.modules.eval()
    handles = [
        module.register_forward_hook(hook(key), with_kwargs=True)
        for key, module in modules.items()
    ]
    try:
        with brain.evaluation_ctx:
            brain.compute_forward(copy.copy(batch), stage=sb.Stage.VALID)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _check_chain(
    calls: list[Call], batch: Any, signal: str, device: str
) -> None:
    """Each module must be called once, on what the one before it gave."""
    if not calls:
        raise NoFolderError("the recipe calls none of its `modules`")
    for call in calls:
        if sum(other.key == call.key for other in calls) > 1:
            raise NoFolderError(f"the recipe calls '{call.key}' repeatedly")
    wavs, _ = audio_of(batch, signal)
    if not _same(calls[0].args[:1], (wavs.to(device),)):
        raise NoFolderError(
            f"'{calls[0].key}' gets something other than the audio: the "
            "recipe changes it first"
        )
    for before, after in itertools.pairwise(calls):
        if not _same(after.args, (before.output,)):
            raise NoFolderError(
                f"'{after.key}' gets something other than the output of "
                f"'{before.key}'"
            )


def _same(one: tuple, two: tuple) -> bool:
    return len(one) == len(two) and all(
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and torch.equal(a, b)
        for a, b in zip(one, two, strict=True)
    )


def _check_rebuilt(
    call: Call, rebuilt: nn.Module, args: tuple, brain: sb.Brain, what: str
) -> None:
    # As it was observed: the recipe may evaluate in 16 bits. Only here, since
    # autocast remembers the weights that it met first.
    with torch.no_grad(), brain.evaluation_ctx:
        output = rebuilt(*args)
    if not isinstance(output, torch.Tensor) or not isinstance(
        call.output, torch.Tensor
    ):
        raise NoFolderError(f"'{call.key}' does not give one tensor")
    if output.shape != call.output.shape or not torch.allclose(
        output.float(), call.output.float(), rtol=1e-4, atol=1e-4
    ):
        raise NoFolderError(
            f"'{call.key}' gives something other than {what}; its code or "
            "its settings were changed"
        )


# -- the encoder -----------------------------------------------------------


def _describe_encoder(
    call: Call, wrapper: nn.Module, brain: sb.Brain
) -> tuple[dict, str]:
    """Settings of the wrapper and ``config.json`` of its model, from which
    both are made again and compared with what they are."""
    if not isinstance(wrapper, Wav2Vec2):
        raise NoFolderError(
            f"'{call.key}' is a {type(wrapper).__name__}, not SpeechBrain's "
            "Wav2Vec2 with a HuggingFace model"
        )
    lengths = [arg for arg in call.args[1:] if arg is not None]
    settings = {name: getattr(wrapper, name) for name in WRAPPER_SETTINGS}
    config = json.loads(wrapper.model.config.to_json_string(use_diff=False))
    # Where it came from is nobody's business.
    config.pop("_name_or_path", None)
    config = check_config(config)
    model = _model_again(wrapper.model, config, f"{call.key}.model")
    rebuilt = StoredEncoder(model, **settings).eval()
    args = (call.args[0], *lengths)
    what = "SpeechBrain's wrapper of the model that its configuration describes"
    _check_rebuilt(call, rebuilt, args, brain, what)
    settings = {"key": call.key, "use_lengths": bool(lengths), **settings}
    return settings, json.dumps(config, indent=1, sort_keys=True) + "\n"


def _model_again(
    model: nn.Module, config: Mapping[str, Any], path: str
) -> nn.Module:
    """The model that a configuration describes, with the tensors of one that
    is there and of the same modules."""
    again = empty_encoder(config)
    state = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    expected = {n: tensor.shape for n, tensor in again.state_dict().items()}
    if shapes != expected:
        raise NoFolderError(
            f"the encoder ({type(model).__name__}) is not the model that its "
            "configuration describes"
        )
    described = dict(again.named_modules())
    for name, module in model.named_modules():
        other = described.get(name)
        if other is None or _settings(module) != _settings(other):
            found = "nothing" if other is None else _settings(other)
            raise NoFolderError(
                f"'{path}.{name}' is {_settings(module)}, and the model's "
                f"configuration describes {found}"
            )
    again.load_state_dict(state, assign=True)
    return again


def _settings(module: nn.Module) -> str:
    """Kind of a module and what it is made with, as far as it computes."""
    name = type(module).__name__
    # Nothing is dropped when a model is evaluated.
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return name
    return f"{name}({module.extra_repr()})"


# -- heads -----------------------------------------------------------------


def _describe_head(
    call: Call, module: nn.Module, nodes: Mapping[str, Any], brain: sb.Brain
) -> str:
    """YAML that makes a module again: ``key: !new:...``."""
    for name, child in module.named_modules(prefix=call.key):
        if getattr(child, "max_norm", None) is not None:
            raise NoFolderError(f"'{name}' has a max_norm: it needs its floats")
    text = _plain_node(module)
    if text is not None:
        text = f"{call.key}: {text}"
    elif call.key in nodes:
        text = _node_text(call.key, nodes[call.key])
    else:
        raise NoFolderError(
            f"'{call.key}' ({type(module).__name__}) has no `!new:` node in "
            "the hyperparams.yaml of the recipe's output_folder; write it as "
            "one in the recipe's YAML"
        )
    rebuilt = load_hyperpyyaml(text)[call.key]
    try:
        rebuilt.load_state_dict(module.state_dict())
    except RuntimeError as error:
        raise NoFolderError(
            f"'{call.key}' does not have the parameters of its YAML node: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    rebuilt.to(brain.device).eval()
    _check_rebuilt(call, rebuilt, call.args, brain, "its YAML node")
    return text


def _plain_node(module: nn.Module, indent: str = "  ") -> str | None:
    """A module of a plain kind as a YAML node; None for other kinds.

    Example
    -------
    >>> print(_plain_node(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    !new:torch.nn.Sequential
      - !new:torch.nn.Linear
        in_features: 2
        out_features: 3
        bias: true
      - !new:torch.nn.ReLU {}
    """
    kind = type(module)
    if kind is nn.Sequential:
        nodes = [_plain_node(child, f"{indent}  ") for child in module]
        if None in nodes or not nodes:
            return None
        return _block("torch.nn.Sequential", [f"- {n}" for n in nodes], indent)
    if kind is SpeechBrainLinear:
        name = "speechbrain.nnet.linear.Linear"
        settings = {
            "input_size": module.w.in_features,
            "n_neurons": module.w.out_features,
            "bias": module.w.bias is not None,
            "combine_dims": module.combine_dims,
        }
    elif kind in _ARGUMENTS:
        name = f"torch.nn.{kind.__name__}"
        settings = {key: getattr(module, key) for key in _ARGUMENTS[kind]}
        if kind in (nn.Linear, nn.LayerNorm):
            settings["bias"] = module.bias is not None
    else:
        return None
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    return _block(name, lines, indent)


def _block(name: str, lines: list[str], indent: str) -> str:
    if not lines:
        return f"!new:{name} {{}}"
    return f"!new:{name}" + "".join(f"\n{indent}{line}" for line in lines)


def _recipe_nodes(brain: sb.Brain) -> dict[str, Any]:
    """YAML nodes of the recipe's modules, without references.

    SpeechBrain saves the recipe's YAML in its output folder, overrides and
    references resolved.
    """
    folder = getattr(brain.hparams, "output_folder", None)
    path = Path(str(folder)) / HYPERPARAMS_FILE
    if folder is None or not path.is_file():
        return {}
    with open(path, encoding="utf-8") as stream:
        tree = ruamel.yaml.YAML().load(stream)
    modules = tree.get("modules") if isinstance(tree, dict) else None
    nodes = modules if isinstance(modules, dict) else {}
    return {key: node for key, node in nodes.items() if _is_made(node)}


def _tag(node: Any) -> str:
    return getattr(getattr(node, "tag", None), "value", None) or ""


def _is_made(node: Any) -> bool:
    """Whether a node makes an object, and calls nothing else on the way."""
    return _tag(node).startswith("!new:") and not _calls(node)


def _calls(node: Any) -> bool:
    if _tag(node).startswith("!apply"):
        return True
    if isinstance(node, dict):
        return any(_calls(value) for value in node.values())
    return isinstance(node, list) and any(_calls(value) for value in node)


def _node_text(key: str, node: Any) -> str:
    out = StringIO()
    # A copy outside of its tree: nothing else refers to its anchors.
    ruamel.yaml.YAML().dump({key: copy.deepcopy(node)}, out)
    return out.getvalue()


def _blank_index(brain: sb.Brain, tokenizer: Any) -> int:
    index = getattr(brain.hparams, "blank_index", None)
    if index is None and hasattr(tokenizer, "blank_label"):
        index = tokenizer.get_blank_index()
    if not isinstance(index, int) or isinstance(index, bool):
        raise NoFolderError(
            "the recipe has no key `blank_index`, and its tokenizer no blank"
        )
    return index
