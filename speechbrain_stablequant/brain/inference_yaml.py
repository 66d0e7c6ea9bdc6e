"""An inference YAML in SpeechBrain's layout, rewritten for a quantized folder.

The YAML's objects are made once, in memory: its modules are found in the recipe
by their keys, or by the shapes of their tensors.
"""

import pydoc
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.integrations.huggingface.huggingface import (
    HFTransformersInterface,
)
from torch import nn

from ..config import CommonConfig
from ..folder.errors import NoFolderError
from ..folder.module_state import hooked_modules
from ..folder.recognizer_spec import interface_of
from ..folder.write import ModulesSource
from .decoding import folder_tokenizer
from .metrics import Row
from .recipe_yaml import (
    PLACES,
    dumped,
    huggingface_files,
    late_node,
    makes_calls,
    parts_of,
    tag_of,
)

#: Keys of what SpeechBrain's classes compute with.
_ROOTS = ("modules", "decoding_function", "tokenizer", "encoder", "decoder")
_REFERENCE = re.compile(r"<([^<>\[\].]+)[^<>]*>")
_OURS = ("backend", "backend_options")


def given_source(
    brain: sb.Brain,
    config: CommonConfig,
    names: Iterable[str],
    rows: Sequence[Row],
) -> tuple[ModulesSource, dict[str, nn.Module]]:
    """The folder that an inference YAML describes, for a recipe that recognized
    ``rows``, and the modules that fill it; ``names``: the quantized layers."""
    file = Path(config.inference)
    if not file.is_file():
        raise NoFolderError(f"quantize.inference: there is no file {file}")
    tree = ruamel.yaml.YAML().load(file) or {}
    kept = _kept(tree)
    loaded = _reached(tree, ["pretrainer"])
    with torch.random.fork_rng([]):
        every = load_hyperpyyaml(
            dumped({k: v for k, v in tree.items() if k in kept | loaded})
        )
    pretrainer = every.get("pretrainer")
    hparams = {key: every[key] for key in tree if key in kept}
    live = live_modules(brain)
    made = {k: v for k, v in hparams.items() if isinstance(v, nn.Module)}
    places = _places(live, made)
    _check_layers(names, places)
    filled = {name: live[name] for name in places}
    for key in _uncovered(hparams, made, places):
        _load_rest(pretrainer, made[key], key, file.parent)
        places[key] = (key, "")
        filled[key] = made[key]
    interface, encoder = _interface(hparams)
    tokenizer = None
    if interface != "WhisperASR":
        tokenizer = folder_tokenizer(brain, rows, False)
        wanted = type(hparams["tokenizer"])
        if not issubclass(wanted, pydoc.locate(tokenizer.kind)):
            raise NoFolderError(
                f"quantize.inference: its tokenizer is a {wanted.__name__}, "
                f"the recipe's a {tokenizer.kind}"
            )
    files = {tokenizer.file: tokenizer.content} if tokenizer else {}
    late, wrappers = _late_keys(tree, hparams)
    if wrappers:
        files |= huggingface_files(hparams[wrappers[0]])
    rewritten = _rewritten(tree, kept, late, wrappers)
    source = ModulesSource(
        text=dumped(rewritten),
        interface=interface,
        places=places,
        encoder=encoder,
        late=late,
        tokenizer_file=tokenizer and tokenizer.file,
        files=files,
        sample_rate=config.sample_rate,
    )
    return source, filled


def live_modules(brain: sb.Brain) -> dict[str, nn.Module]:
    """The recipe's modules with something to store, by key: the Brain's, then
    others of its hparams."""
    found = dict(brain.modules.items())
    stored = {x for module in found.values() for x in contents_of(module)}
    for key, value in vars(brain.hparams).items():
        container = type(value) in (nn.ModuleList, nn.ModuleDict)
        if not isinstance(value, nn.Module) or container or key in found:
            continue
        # Wrappers of the Brain's modules hold nothing else.
        if contents_of(value) - stored:
            found[key] = value
            stored |= contents_of(value)
    return {key: m for key, m in found.items() if contents_of(m)}


def check_one_wrapper(keys: Sequence[str]) -> None:
    """Raise if a folder would need the configuration of several models."""
    if len(keys) > 1:
        raise NoFolderError(
            f"{' and '.join(keys)} are models of HuggingFace, and a folder "
            "holds the configuration of one"
        )


def contents_of(module: nn.Module) -> set[int]:
    """Parameters, and modules that keep something else."""
    owners = [x for _, x in hooked_modules({"": module})]
    return {id(x) for x in (*module.parameters(), *owners)}


def _interface(hparams: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """SpeechBrain's class for a YAML, and the keys of its encoder."""
    modules = hparams.get("modules") or {}
    name = interface_of(set(hparams), set(modules))
    if name is None:
        raise NoFolderError(
            "quantize.inference: is none of EncoderASR's (modules: encoder; "
            "decoding_function, tokenizer), EncoderDecoderASR's (modules: "
            "encoder, decoder; tokenizer) or WhisperASR's (modules: whisper, "
            "decoder; language, sample_rate)"
        )
    roots = ["whisper" if name == "WhisperASR" else "encoder"]
    if hparams.get("transformer_beam_search"):
        roots.append("transformer")
    return name, tuple(key_of(hparams, modules[x], x) for x in roots)


def key_of(hparams: Mapping[str, Any], value: Any, name: str) -> str:
    """The top-level key of an object, which a reference needs."""
    for key, other in hparams.items():
        if other is value:
            return key
    raise NoFolderError(
        f"quantize.inference: write its module '{name}' under a key of its "
        "own, and a !ref to it in `modules`"
    )


# -- the tree -----------------------------------------------------------------


def _kept(tree: Any) -> set[str]:
    """Keys that a folder's YAML keeps: all but those that only the pretrainer
    reads, or that call something and that nothing reads."""
    if "modules" not in tree:
        raise NoFolderError("quantize.inference: has no key `modules`")
    for key in _OURS:
        if key in tree:
            raise NoFolderError(f"quantize.inference.{key}: is a key of ours")
    used = _reached(tree, _ROOTS)
    for key in used:
        if makes_calls(tree[key]):
            raise NoFolderError(
                f"quantize.inference.{key}: calls something (!apply), which a "
                "folder must not do"
            )
    loaded = _reached(tree, ["pretrainer"])
    others = {
        key
        for key in set(tree) - loaded
        if not (makes_calls(tree[key]) or str(key).startswith("__"))
    }
    return used | _reached(tree, others)


def _reached(tree: Any, keys: Iterable[str]) -> set[str]:
    """Keys that some keys refer to, these included."""
    found: set[str] = set()
    left = list(keys)
    while left:
        key = left.pop()
        if key not in found and key in tree:
            found.add(key)
            left += _references(tree[key])
    return found


def _references(node: Any) -> Iterator[str]:
    for part in parts_of(node):
        if tag_of(part) in ("!ref", "!copy"):
            yield from _REFERENCE.findall(str(part.value))


def _late_keys(
    tree: Any, hparams: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of HuggingFace's wrappers and of what is made from them, those that
    others need first; and the wrappers among them."""
    wrappers = tuple(
        key
        for key, value in hparams.items()
        if isinstance(value, HFTransformersInterface)
    )
    check_one_wrapper(wrappers)
    reached = {
        key: _reached(tree, [key])
        for key in hparams
        if tag_of(tree[key]).startswith("!new:")
    }
    late = [key for key, found in reached.items() if found & set(wrappers)]
    return tuple(sorted(late, key=lambda key: len(reached[key]))), wrappers


def _rewritten(
    tree: Any,
    kept: Collection[str],
    late: Collection[str],
    wrappers: Collection[str],
) -> dict[str, Any]:
    """The kept keys, without where a wrapper's model comes from."""
    gone = {
        name
        for key in wrappers
        for setting in PLACES
        for name in _references(tree[key].get(setting))
    }
    rows = {
        key: late_node(tree[key], key in wrappers) if key in late else tree[key]
        for key in tree
        if key in kept
    }
    used = {name for row in rows.values() for name in _references(row)}
    return {k: v for k, v in rows.items() if k not in gone - used}


# -- the modules ---------------------------------------------------------------


def _places(
    live: Mapping[str, nn.Module], made: Mapping[str, nn.Module]
) -> dict[str, tuple[str, str]]:
    """Where each module of a recipe is among those of a YAML."""
    paths = [
        (key, path, child)
        for key, module in made.items()
        for path, child in module.named_modules()
    ]
    places = {}
    for name, module in live.items():
        fits = [(k, p, x) for k, p, x in paths if _alike(module, x)]
        if name in made and _alike(module, made[name]):
            places[name] = (name, "")
        elif len({id(x) for *_, x in fits}) == 1:
            places[name] = fits[0][:2]
    return places


def _alike(one: nn.Module, two: nn.Module) -> bool:
    """Whether two modules store the same things."""
    kinds = [[type(x) for _, x in hooked_modules({"": m})] for m in (one, two)]
    return kinds[0] == kinds[1] and _shapes(one) == _shapes(two)


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {
        name: getattr(x, "shape", None)
        for name, x in module.state_dict().items()
    }


def _check_layers(
    names: Iterable[str], places: Mapping[str, tuple[str, str]]
) -> None:
    for name in names:
        key = name.partition(".")[0]
        if key not in places:
            raise NoFolderError(
                f"quantize.inference: no module of it has the tensors of "
                f"'{key}', whose layer '{name}' is quantized; name it "
                f"'{key}', or leave it out of quantize.target"
            )


def _uncovered(
    hparams: Mapping[str, Any],
    made: Mapping[str, nn.Module],
    places: Mapping[str, tuple[str, str]],
) -> list[str]:
    """Keys of modules with parameters that no module of the recipe fills."""
    filled: set[int] = set()
    for key, path in places.values():
        filled |= contents_of(made[key].get_submodule(path))
    # Containers last: what they hold may have a key of its own.
    keys = sorted(made, key=lambda key: len(list(made[key].modules())))
    left = []
    for key in keys:
        if contents_of(made[key]) - filled:
            left.append(key)
            filled |= contents_of(made[key])
    for key, module in hparams["modules"].items():
        if contents_of(module) - filled:
            key_of(hparams, module, key)
    return left


def _load_rest(
    pretrainer: Any, module: nn.Module, key: str, folder: Path
) -> None:
    """Loads a module that the recipe does not hold by the YAML's own
    pretrainer, such as a language model."""
    loadables = getattr(pretrainer, "loadables", {})
    names = [name for name, value in loadables.items() if value is module]
    try:
        if not names:
            raise ValueError("its pretrainer does not load it")
        for name in set(loadables) - set(names):
            del loadables[name]
        pretrainer.collect_files(default_source=str(folder))
        pretrainer.load_collected()
    except Exception as error:
        raise NoFolderError(
            f"quantize.inference: the recipe has no module with the tensors of "
            f"'{key}', and it cannot be loaded ({error})"
        ) from error
