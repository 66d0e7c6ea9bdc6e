"""Captures a module as an OpenVINO graph of any length and batch.

Tracing and ``torch.export`` may both bake a length or a batch into the graph
silently, so what is captured is compared with the module on several lengths
and batches, in float32.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ...core.integer_layer import float_layer
from ...core.parts import Part
from ...utils.patching import shadowed
from ...utils.typed import one_line
from ..forwards import find_modules
from ..openvino_.core import core
from .calls import (
    Call,
    CaptureError,
    Signature,
    between,
    by_length,
    enlarged,
    guessed,
    shortened,
    signature_of,
    unbatched,
)
from .sites import Sites

WAYS = ("trace", "export")

#: Largest difference in float32, relative to the largest value.
_TOLERANCE = 1e-3

#: torch.jit.trace and our operator have a state of the process.
_LOCK = threading.RLock()


class Outputs(NamedTuple):
    """What a module returns."""

    structure: TreeSpec
    #: Everything that is no tensor, by position.
    constants: dict[int, Any]
    #: Positions of the tensors that the graph computes.
    read: list[int]

    def build(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The module's output; None in place of tensors that are not read."""
        values = [None] * self.structure.num_leaves
        for place, value in self.constants.items():
            values[place] = value
        for place, tensor in zip(self.read, tensors, strict=True):
            values[place] = tensor
        return tree_unflatten(values, self.structure)


class _Flat(nn.Module):
    """A module from tensors to tensors."""

    def __init__(
        self, module: nn.Module, signature: Signature, read: Sequence[int]
    ):
        super().__init__()
        self.module = module
        self._signature = signature
        self._read = read
        self.outputs: Outputs | None = None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self._signature.call(tensors)
        values, structure = tree_flatten(self.module(*args, **kwargs))
        places = [
            i for i, x in enumerate(values) if isinstance(x, torch.Tensor)
        ]
        constants = {i: x for i, x in enumerate(values) if i not in places}
        read = [i for i in places if i in self._read] if self._read else places
        self.outputs = Outputs(structure, constants, read)
        return tuple(values[i] for i in read)


class Captured(NamedTuple):
    """A graph, and what its outputs are."""

    model: ov.Model
    outputs: Outputs


@torch.no_grad()
def capture(
    module: nn.Module,
    signature: Signature,
    way: str,
    sites: Sites,
    read: Sequence[int] = (),
) -> Captured:
    """Capture a module in one of ``WAYS``."""
    flat = _Flat(module, signature, read).eval()
    # Export takes an axis of length 1 for a constant.
    tensors = tuple(signature.example(1 if way == "trace" else 2))
    with _LOCK, ExitStack() as stack:
        stack.enter_context(_plain_masks(module))
        stack.enter_context(sites.replaced())
        stack.enter_context(_quiet())
        stack.enter_context(_without_losses(module))
        flat(*tensors)
        outputs = flat.outputs
        if way == "trace":
            model = ov.convert_model(
                flat, example_input=tensors, extension=sites.extensions
            )
        else:
            axes = tuple(
                dict.fromkeys(leaf.free, torch.export.Dim.AUTO)
                for leaf in signature.inputs
            )
            program = torch.export.export(
                flat, tensors, dynamic_shapes=(axes,), strict=False
            )
            _drop_whole_slices(program.graph)
            model = ov.convert_model(program, extension=sites.extensions)
    sites.check()
    if len(model.inputs) != len(tensors):
        raise CaptureError("the graph lost an argument")
    for leaf, parameter in zip(
        signature.inputs, model.get_parameters(), strict=True
    ):
        sizes = [-1 if i in leaf.free else n for i, n in enumerate(leaf.shape)]
        parameter.set_partial_shape(ov.PartialShape(sizes))
    model.validate_nodes_and_infer_types()
    return Captured(model, outputs)


def _drop_whole_slices(graph: torch.fx.Graph) -> None:
    """Remove each ``x[:]``, which OpenVINO 2026.0 does not convert."""
    for node in list(graph.nodes):
        whole = len(node.args) == 1 and not node.kwargs
        if node.target is torch.ops.aten.slice.Tensor and whole:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings of tracing: results are checked."""
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # OpenVINO's converter leaves the root logger at ERROR.
        logging.root.setLevel(level)


@contextmanager
def _without_losses(module: nn.Module) -> Iterator[None]:
    """Context in which models of transformers have a loss, which is None:
    tracing reads all attributes, and this one warns where it is unknown."""
    with ExitStack() as stack:
        for child in module.modules():
            if hasattr(type(child), "loss_function"):
                stack.enter_context(shadowed(child, "_loss_function", None))
        yield


# -- masks ---------------------------------------------------------------------


def _length_to_mask(length, max_len=None, dtype=None, device=None):
    """SpeechBrain's ``length_to_mask``; without ``max_len`` its length must
    not become a constant."""
    size = length.max().long() if max_len is None else max_len
    places = torch.arange(size, device=length.device)
    mask = places < length.unsqueeze(1)
    return mask.to(dtype=dtype or length.dtype, device=device)


def _feature_mask(model: nn.Module, frames, attention_mask, add_adapter=None):
    """transformers' ``_get_feature_vector_attention_mask``."""
    lengths = model._get_feat_extract_output_lengths(
        attention_mask.cumsum(-1)[:, -1], add_adapter=add_adapter
    )
    places = torch.arange(frames, device=attention_mask.device)
    return places < lengths.long()[:, None]


def _padding_masks(src, wav_len=None, pad_idx=0):
    """SpeechBrain's ``make_padding_masks`` for HuggingFace models."""
    if wav_len is None:
        return None
    places = torch.arange(src.shape[1], device=src.device)
    return places < torch.round(wav_len * src.shape[1])[:, None]


_REPLACED = {
    ("speechbrain.dataio.dataio", "length_to_mask"): _length_to_mask,
    (
        "speechbrain.integrations.huggingface.huggingface",
        "make_padding_masks",
    ): _padding_masks,
}


@contextmanager
def _plain_masks(module: nn.Module) -> Iterator[None]:
    """Context in which masks are computed from lengths alone."""
    with ExitStack() as stack:
        for (home, name), function in _REPLACED.items():
            original = getattr(sys.modules.get(home), name, None)
            for other in list(sys.modules.values()):
                if original and vars(other).get(name) is original:
                    stack.enter_context(shadowed(other, name, function))
        name = "_get_feature_vector_attention_mask"
        for child in module.modules():
            if hasattr(child, name):
                method = _feature_mask.__get__(child)
                stack.enter_context(shadowed(child, name, method))
        yield


# -- the choice of the way -----------------------------------------------------


@torch.no_grad()
def capture_part(
    name: str,
    module: nn.Module,
    calls: Sequence[Call],
    sites: Iterable[str],
    read: Sequence[int] = (),
) -> Part:
    """Find how a module in evaluation mode can be captured, from some of its
    calls, of several lengths if it takes them. ``sites``: paths of the layers
    inside that a plan quantizes; ``read``: positions of the outputs that are
    read, all by default. CaptureError if neither way gives a graph that
    computes what the module does."""
    signature = signature_of(calls)
    signature, trials = _trials(module, signature, calls)
    modules = {name: module}
    layers = {
        site: float_layer(site, child)
        for site, child in find_modules(modules, list(sites)).items()
    }
    reasons = []
    for way in WAYS:
        try:
            graph = capture(
                module, signature, way, Sites(modules, layers), read
            )
            _compare(module, signature, graph, trials)
        # Either way may raise anything.
        except Exception as error:
            reasons.append(f"{way}: {one_line(error)}")
            continue
        return Part(
            name,
            "graph",
            f"captured by {way}",
            way=way,
            structure=signature.dumps(),
            leaves=signature.leaves,
            read=list(read),
        )
    raise CaptureError("; ".join(reasons))


def _trials(
    module: nn.Module, signature: Signature, calls: Sequence[Call]
) -> tuple[Signature, list[list[torch.Tensor]]]:
    """Calls of up to three lengths and two batch sizes, the longest first,
    and the signature with all axes that change between them."""
    known = by_length([signature.tensors(call) for call in calls])
    first = [x.detach() for x in known[0]]
    for other in unbatched(signature) if len(first[0]) == 1 else ():
        if _accepts(module, other, enlarged(first, other, 2)):
            signature = other
            break
    lengths = known[:1]
    if len(known) > 1:
        lengths += [known[-1]]
        middle = known[1:-1][:1] or [between(known[0], known[-1], signature)]
        lengths += [x for x in middle if x is not None]
    elif not any(leaf.dynamic for leaf in signature.leaves):
        other = guessed(signature)
        cut = [shortened(first, other, share) for share in (0.37, 0.71)]
        if all(_accepts(module, other, tensors) for tensors in cut):
            signature, lengths = other, [first, *cut]
    trials = []
    for tensors in lengths:
        trials += [enlarged(tensors, signature, batch) for batch in (1, 2)]
    return signature, trials


def _accepts(
    module: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor]
) -> bool:
    """Whether a module computes a call that nobody has observed."""
    args, kwargs = signature.call(tensors)
    try:
        module(*args, **kwargs)
    except Exception:
        return False
    return True


def _compare(
    module: nn.Module,
    signature: Signature,
    graph: Captured,
    trials: Sequence[Sequence[torch.Tensor]],
) -> None:
    """Raise unless a graph computes what the module does."""
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core().compile_model(graph.model, "CPU", settings)
    outputs = graph.outputs
    for tensors in trials:
        args, kwargs = signature.call([x.clone() for x in tensors])
        values, structure = tree_flatten(module(*args, **kwargs))
        same = structure == outputs.structure and all(
            values[i] == x for i, x in outputs.constants.items()
        )
        if not same:
            raise CaptureError("its output depends on more than tensors")
        found = request([x.numpy() for x in tensors])
        for i, place in enumerate(outputs.read):
            check_same(values[place], found[i], tensors[0].shape)


def check_same(
    expected: torch.Tensor, found: np.ndarray, shape: Sequence[int]
) -> None:
    """Raise unless a graph gives what a module does for an input."""
    what = f"for an input of {'x'.join(map(str, shape))}"
    if tuple(expected.shape) != found.shape:
        raise CaptureError(
            f"{what} the graph gives {found.shape} instead of "
            f"{tuple(expected.shape)}"
        )
    expected = expected.double()
    difference = (expected - torch.from_numpy(found.astype(np.float64))).abs()
    # Where the module gives NaN or infinity, nothing is compared.
    finite = expected.isfinite()
    largest = float(expected[finite].abs().max()) if finite.any() else 0.0
    off = float(difference[finite].max()) if finite.any() else 0.0
    if not off <= _TOLERANCE * max(largest, 1e-6):
        raise CaptureError(
            f"{what} the graph is off by {off:.2g} of {largest:.2g}"
        )
