"""An inference YAML for a recipe that has none.

For features, encoder and CTC (``EncoderASR``); for searchers of attentional
decoders and transducers (``EncoderDecoderASR``); for Whisper (``WhisperASR``).
What is written is verified by what it transcribes, see :mod:`.rebuilt`.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import speechbrain as sb
from speechbrain.decoders.ctc import CTCBaseSearcher, CTCBeamSearcher
from speechbrain.decoders.seq2seq import (
    S2SWhisperBeamSearcher,
    S2SWhisperGreedySearcher,
)
from speechbrain.decoders.transducer import TransducerBeamSearcher
from speechbrain.integrations.huggingface.huggingface import (
    HFTransformersInterface,
)
from torch import nn

from ..config import CommonConfig
from ..folder.errors import NoFolderError
from ..folder.write import ModulesSource
from .decoding import find_tokenizer, folder_tokenizer, markers_of
from .inference_yaml import check_one_wrapper, live_modules
from .metrics import Row
from .recipe_chain import SEARCHERS, Observed, chain_to
from .recipe_yaml import (
    OURS,
    Nodes,
    dumped,
    huggingface_files,
    recipe_tree,
    reference,
    tagged,
)

_WHISPER = (S2SWhisperBeamSearcher, S2SWhisperGreedySearcher)


def named_modules(brain: sb.Brain) -> dict[str, nn.Module]:
    """The modules that a recipe has under a key, each once; the Brain's
    first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for key, value in [*brain.modules.items(), *vars(brain.hparams).items()]:
        if isinstance(value, nn.Module):
            found.setdefault(id(value), (key, value))
    return dict(found.values())


def loading_class(brain: sb.Brain) -> str:
    """SpeechBrain's class for a recipe's folder, by its searchers."""
    kinds = [type(module) for module in named_modules(brain).values()]
    if any(issubclass(kind, _WHISPER) for kind in kinds):
        return "WhisperASR"
    searches = any(issubclass(kind, SEARCHERS) for kind in kinds)
    return "EncoderDecoderASR" if searches else "EncoderASR"


def generated_source(
    brain: sb.Brain,
    config: CommonConfig,
    names: Iterable[str],
    seen: Observed,
    rows: Sequence[Row],
) -> tuple[ModulesSource, dict[str, nn.Module]]:
    """The folder of a recipe that was observed in its TEST stage, where it
    recognized ``rows``, and the modules that fill it; ``names``: the quantized
    layers."""
    modules = named_modules(brain)
    wrappers = {
        key: module
        for key, module in modules.items()
        if isinstance(module, HFTransformersInterface)
    }
    tree = recipe_tree(brain)
    if tree is None:
        raise NoFolderError(
            "there is no hyperparams.yaml in the recipe's output_folder to "
            "generate an inference YAML from; give quantize.inference"
        )
    nodes = Nodes(tree, wrappers)
    searcher = seen.searcher and modules[seen.searcher.key]
    if isinstance(searcher, _WHISPER):
        _add_whisper(brain, nodes, seen)
    elif seen.decoded is not None:
        _add_encoder(brain, nodes, seen, modules)
        if searcher is None:
            markers = [] if find_tokenizer(brain) else markers_of(brain)
            _add_ctc(nodes.out, seen.ctc, markers)
        else:
            _rename(nodes, nodes.add(seen.searcher.key), "decoder")
            transducer = isinstance(searcher, TransducerBeamSearcher)
            nodes.out["transducer_beam_search"] = transducer
        nodes.out["sample_rate"] = config.sample_rate
    else:
        raise NoFolderError(
            "the recipe calls none of SpeechBrain's searchers and not "
            "ctc_greedy_decode in the TEST stage; give quantize.inference"
        )
    nodes.out["audio_normalizer"] = tagged(
        "!new:speechbrain.dataio.preprocess.AudioNormalizer",
        {"sample_rate": reference("sample_rate")},
    )
    labels = getattr(seen.ctc, "vocab_list", ())
    return _source(brain, config, names, nodes, wrappers, rows, labels)


def _add_encoder(
    brain: sb.Brain,
    nodes: Nodes,
    seen: Observed,
    modules: Mapping[str, nn.Module],
) -> None:
    """Adds the chain from audio to what is decoded."""
    steps = chain_to(seen.decoded, seen, modules, brain)
    for step in steps:
        step["module"] = nodes.add(step["module"])
    keys = dict.fromkeys(step["module"] for step in steps)
    chain = {"modules": {k: reference(k) for k in keys}, "calls": steps}
    nodes.out["encoder"] = tagged(f"{OURS}.EncoderChain", chain)


def _add_whisper(brain: sb.Brain, nodes: Nodes, seen: Observed) -> None:
    """Adds what WhisperASR reads."""
    _rename(nodes, nodes.add(seen.searcher.key), "decoder")
    out = nodes.out
    if "whisper" not in out:
        raise NoFolderError(
            "the recipe's Whisper has another key than `whisper`, which "
            "WhisperASR needs; give quantize.inference"
        )
    whisper = named_modules(brain)["whisper"]
    out["language"] = whisper.language
    out["sample_rate"] = whisper.sampling_rate
    normalized = hasattr(brain.hparams, "normalized_transcripts")
    out["normalized_transcripts"] = normalized


def _rename(nodes: Nodes, key: str, name: str) -> None:
    nodes.out[name] = nodes.out.pop(key)
    nodes.late[:] = [name if k == key else k for k in nodes.late]


def _add_ctc(
    out: dict[str, Any], decoder: CTCBaseSearcher | int, markers: list[str]
) -> None:
    """Adds the decoding function: greedy, or a beam search's class and
    options; ``markers`` are taken out of its texts."""
    if isinstance(decoder, int):
        out["decoding_function"] = tagged(
            "!name:speechbrain.decoders.ctc_greedy_decode",
            {"blank_id": decoder},
        )
        return
    kind = type(decoder)
    if decoder.kenlm_model_path is not None:
        raise NoFolderError(
            f"{kind.__name__} reads a KenLM file, which a folder does not "
            "hold; give quantize.inference"
        )
    options = {
        name: getattr(decoder, name)
        for name in inspect.signature(CTCBaseSearcher.__init__).parameters
        if name not in ("self", "vocab_list", "kenlm_model_path", "unigrams")
    }
    skip = math.exp(options["blank_skip_threshold"])
    options["blank_skip_threshold"] = round(skip, 12)
    name = f"{kind.__module__}.{kind.__name__}"
    if markers and kind is CTCBeamSearcher:
        name = "speechbrain_stablequant.inference.MarkedBeamSearcher"
        options["markers"] = markers
    out["decoding_function"] = tagged(f"!name:{name}", {})
    out["test_beam_search"] = options


def _source(
    brain: sb.Brain,
    config: CommonConfig,
    names: Iterable[str],
    nodes: Nodes,
    wrappers: Mapping[str, nn.Module],
    rows: Sequence[Row],
    labels: Sequence[str],
) -> tuple[ModulesSource, dict[str, nn.Module]]:
    """The folder of a YAML's nodes."""
    # Also what is quantized and used for a loss alone.
    for key in dict.fromkeys(name.partition(".")[0] for name in names):
        nodes.add(key)
    out, live = nodes.out, live_modules(brain)
    live = {k: m for k, m in live.items() if nodes.key_of(k) in out}
    places = {key: (nodes.key_of(key), "") for key in live}
    used = [key for key in wrappers if nodes.key_of(key) in out]
    check_one_wrapper(used)
    files = {}
    for key in used:
        files = huggingface_files(wrappers[key])
    roots = [key for key in ("encoder", "decoder") if key in out]
    keys = dict.fromkeys([*roots, *(key for key, _ in places.values())])
    out["modules"] = {key: reference(key) for key in keys}
    if "encoder" not in out:
        interface, encoder, tokenizer = "WhisperASR", "whisper", None
    else:
        interface = "EncoderDecoderASR" if "decoder" in out else "EncoderASR"
        encoder = "encoder"
        tokenizer = folder_tokenizer(brain, rows, "decoder" in out, labels)
        out["tokenizer"] = tagged(f"!new:{tokenizer.kind}", {})
        files[tokenizer.file] = tokenizer.content
    source = ModulesSource(
        text=dumped(out),
        interface=interface,
        places=places,
        encoder=(encoder,),
        late=tuple(nodes.late),
        tokenizer_file=tokenizer and tokenizer.file,
        files=files,
        sample_rate=config.sample_rate,
    )
    return source, live
