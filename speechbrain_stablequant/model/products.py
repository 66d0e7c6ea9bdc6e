"""Products whose weight is held by a module that calls no child for them.

Attention multiplies by raw parameters, so hooks and replaced forwards of a
child would never be reached. Rows of such a parameter are a *virtual* linear,
:class:`RowsLinear`. Inside of :func:`visible` the owner's own code calls the
module of each product: ``F.linear`` is intercepted while the owner runs. Of a
tied output projection the caller multiplies the owner's output by an
embedding's weight: there the output intercepts that product.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..utils.patching import shadowed
from .projected import projected

_CACHE = "_stablequant_products"


class RowsLinear(nn.Linear):
    """A Linear whose weight and bias are rows of its owner's parameters.

    It is no registered child of its owner: the state dict keeps its names.
    """

    def __init__(
        self, owner: nn.Module, weight: str, rows: slice, bias: str, at: slice
    ):
        nn.Module.__init__(self)
        # In the dictionary, so that the owner is no child either.
        vars(self)["owner"] = owner
        self.weight_name, self.rows = weight, rows
        self.bias_name, self.bias_rows = bias, at
        self.out_features, self.in_features = self.weight.shape

    @property
    def tied(self) -> bool:
        """Whether an embedding, a child of its owner, has the same weight."""
        return "." in self.weight_name

    @property
    def weight(self) -> torch.Tensor:
        """Rows of the owner's parameter."""
        return attrgetter(self.weight_name)(self.owner)[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """Rows of the owner's bias, if it has one."""
        bias = getattr(self.owner, self.bias_name, None)
        return None if bias is None else bias[self.bias_rows]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The owner's parameters that it has rows of."""
        yield attrgetter(self.weight_name)(self.owner)
        bias = getattr(self.owner, self.bias_name, None)
        if bias is not None:
            yield bias


# -- owners --------------------------------------------------------------------

_Rows = dict[str, tuple[str, slice, str, slice]]


def _packed_rows(owner: nn.Module) -> _Rows:
    """Of ``nn.MultiheadAttention``: query apart from key and value, which have
    another input in cross-attention."""
    width, bias = owner.embed_dim, "in_proj_bias"
    query, others = slice(0, width), slice(width, 3 * width)
    if owner._qkv_same_embed_dim:
        weight = "in_proj_weight"
        return {
            "in_proj_q": (weight, query, bias, query),
            "in_proj_kv": (weight, others, bias, others),
        }
    return {
        f"in_proj_{letter}": (
            f"{letter}_proj_weight",
            slice(None),
            bias,
            slice(i * width, (i + 1) * width),
        )
        for i, letter in enumerate("qkv")
    }


def _one_product(owner: nn.Module) -> _Rows:
    """Of SpeechBrain's attention, whose rows interleave q, k and v by head."""
    rows = slice(None)
    return {"in_proj": ("in_proj_weight", rows, "in_proj_bias", rows)}


def _embedding(owner: nn.Module) -> _Rows:
    rows = slice(None)
    return {"output_projection": ("embed_tokens.weight", rows, "", rows)}


class _Kind(NamedTuple):
    """How a class of modules multiplies by raw weights."""

    #: Rows of its own parameters, by name of the virtual linear.
    rows: Callable[[nn.Module], _Rows] = lambda _: {}
    #: Its children whose weights it reads, as paths.
    children: tuple[str, ...] = ()
    #: Whether its rows multiply its output, after it has returned.
    tied: bool = False


_TORCH = "torch.nn.modules"
_QKV = "q_proj", "k_proj", "v_proj"
#: By class name, of a class or its base. torch's layers are listed because
#: their fast path skips the modules inside.
_KINDS = {
    f"{_TORCH}.activation.MultiheadAttention": _Kind(
        _packed_rows, ("out_proj",)
    ),
    f"{_TORCH}.transformer.TransformerEncoderLayer": _Kind(),
    f"{_TORCH}.transformer.TransformerEncoder": _Kind(),
    "speechbrain.nnet.attention.RelPosMHAXL": _Kind(_one_product),
    "speechbrain.nnet.attention.RoPEMHA": _Kind(_one_product),
    "transformers.models.whisper.modeling_whisper.WhisperDecoder": _Kind(
        _embedding, tied=True
    ),
    "transformers.models.wavlm.modeling_wavlm.WavLMAttention": _Kind(
        children=(*_QKV, "out_proj")
    ),
    "torchaudio.models.wav2vec2.wavlm_attention.WavLMSelfAttention": _Kind(
        children=("attention.in_proj_q", "attention.in_proj_kv")
    ),
}


def class_names(module: nn.Module) -> list[str]:
    """Full names of a module's class and its bases: importing the packages
    that define them takes seconds."""
    return [f"{x.__module__}.{x.__qualname__}" for x in type(module).__mro__]


def _kind(module: nn.Module) -> _Kind | None:
    found = (_KINDS.get(name) for name in class_names(module))
    return next((kind for kind in found if kind is not None), None)


def virtual_linears(owner: nn.Module) -> dict[str, RowsLinear]:
    """The virtual linears of a module by name, the same ones each time."""
    kind = _kind(owner)
    if kind is None:
        return {}
    cache = vars(owner)
    if _CACHE not in cache:
        found = {
            name: RowsLinear(owner, *rows)
            for name, rows in kind.rows(owner).items()
        }
        # Another thread may have been faster.
        cache.setdefault(_CACHE, found)
    return cache[_CACHE]


def named_modules(
    module: nn.Module, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As ``module.named_modules``, each owner followed by its virtual
    linears."""
    for name, child in module.named_modules(
        prefix=prefix, remove_duplicate=remove_duplicate
    ):
        yield name, child
        for part, linear in virtual_linears(child).items():
            yield f"{name}.{part}" if name else part, linear


def modules_by_name(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module below the keys by each of its names, virtual linears
    included."""
    return {
        name: child
        for key, module in modules.items()
        for name, child in named_modules(module, key, remove_duplicate=False)
    }


def owners_of(
    name: str, by_name: Mapping[str, nn.Module]
) -> tuple[nn.Module, ...]:
    """Modules around a layer that may compute it without calling it, from the
    outermost; they belong into :func:`visible`."""
    parts, owners = name.split("."), []
    for i in range(1, len(parts)):
        owner = by_name.get(".".join(parts[:i]))
        kind = None if owner is None else _kind(owner)
        if kind and not (kind.tied and i < len(parts) - 1):
            owners.append(owner)
    return tuple(owners)


def tied_parameters(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, str]:
    """Layer among ``names`` by the parameter that it shares with an
    embedding."""
    by_name = modules_by_name(modules)
    found = ((name, by_name.get(name)) for name in names)
    return {
        f"{name.rpartition('.')[0]}.{linear.weight_name}": name
        for name, linear in found
        if getattr(linear, "tied", False)
    }


def covered_parameters(
    modules: Mapping[str, nn.Module], names: Collection[str]
) -> dict[str, tuple[nn.Module, str]]:
    """Owner and attribute of each parameter, by its name in the state dict,
    all of whose rows are virtual linears among ``names``."""
    covered: dict[str, tuple[nn.Module, str]] = {}
    for path, owner in modules_by_name(modules).items():
        linears = virtual_linears(owner).items()
        left = {x.weight_name for n, x in linears if f"{path}.{n}" not in names}
        for weight in {x.weight_name for _, x in linears} - left:
            covered[f"{path}.{weight}"] = owner, weight
    return covered


def free_parameter(module: nn.Module, name: str) -> None:
    """Replaces a parameter that an owner reads by a tensor of its shape that
    holds one number a row: enough to tell rows apart, and no use as weights."""
    shape = module._parameters.pop(name).shape
    vars(module)[name] = torch.full((shape[0], 1), torch.nan).expand(shape)


# -- execution -----------------------------------------------------------------


@contextmanager
def visible(owners: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which owners call the module of each product; free of cost
    without owners."""
    with ExitStack() as stack:
        for owner, forward in visible_forwards(owners).items():
            stack.enter_context(shadowed(owner, "forward", forward))
        yield


def visible_forwards(
    owners: Iterable[nn.Module],
) -> dict[nn.Module, Callable[..., Any]]:
    """The forward of each owner that calls the module of each product. Deep
    copies of an owner that has it as ``forward`` call their own modules."""
    forwards = {}
    for owner in dict.fromkeys(owners):
        before = vars(owner).get("forward")
        # A forward that chooses between others tells which one it hides.
        before = getattr(before, "hidden", before)
        twice = getattr(before, "func", None) is _run_visible
        forwards[owner] = (
            before if twice else partial(_run_visible, owner, before)
        )
    return forwards


def _run_visible(
    owner: nn.Module,
    forward: Callable[..., Any] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    forward = forward or partial(type(owner).forward, owner)
    products = dict(virtual_linears(owner))
    if _kind(owner).tied:
        (product,) = products.values()
        return projected(forward(*args, **kwargs), product)
    for path in _kind(owner).children:
        parent, _, name = path.rpartition(".")
        holder = owner.get_submodule(parent)
        products[path] = virtual_linears(holder).get(name) or getattr(
            holder, name
        )
    with _Intercept(tuple(products.values())):
        return forward(*args, **kwargs)


class _Intercept(TorchFunctionMode):
    """Calls the module of each product in place of ``F.linear``. Calls inside
    of that module are not intercepted. Any such mode switches torch's fast
    path of attention off."""

    def __init__(self, products: tuple[nn.Module, ...], batch: int = 0):
        super().__init__()
        self.products = products
        # Of time-first rows inside of torch's attention; 0 outside of it.
        self.batch = batch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Equal views, such as SpeechBrain's, are one input for all products.
        if _same_view(query, value):
            value = query
        if _same_view(query, key):
            key = query
        elif _same_view(value, key):
            key = value
        batch = query.shape[1] if query.dim() == 3 else 1
        with _Intercept(self.products, batch):
            return attention_forward(query, key, value, *args, **kwargs)

    def _linear(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        parts = self._covering(weight)
        if not parts:
            return F.linear(input, weight, bias)
        x = input
        if self.batch:
            # Utterances first, as every other layer has them.
            x = input.reshape(-1, self.batch, x.shape[-1]).transpose(0, 1)
        outputs = [module(x)[..., rows] for module, rows in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if self.batch:
            out = out.transpose(0, 1).reshape(*input.shape[:-1], out.shape[-1])
        # Of the memory layout that callers expect.
        return out.contiguous()

    def _covering(self, weight: torch.Tensor) -> list[tuple[nn.Module, slice]]:
        """Modules that compute a weight's rows, and which of theirs; empty if
        it belongs to none."""
        storage = weight.untyped_storage().data_ptr()
        first, parts = weight.storage_offset(), []
        stop = first + len(weight) * weight.stride(0)
        for module in self.products:
            own = module.weight
            if own.untyped_storage().data_ptr() != storage:
                continue
            start, step = own.storage_offset(), own.stride(0)
            low, high = (
                min(max((place - start) // step, 0), len(own))
                for place in (first, stop)
            )
            if low < high:
                parts.append((module, slice(low, high)))
        return parts


def _same_view(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return x is y or (
        x.data_ptr() == y.data_ptr()
        and x.shape == y.shape
        and x.stride() == y.stride()
        and x.dtype == y.dtype
    )


#: torch's function, which leaves its body to an active mode and so would call
#: it forever; here modes see the calls of its body.
attention_forward = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
