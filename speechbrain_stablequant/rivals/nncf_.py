"""OpenVINO's NNCF, the nearest thing that users of a CPU have.

The modules that the recipe calls one after the other become one OpenVINO
graph for any length, NNCF quantizes it, and the graph takes the place of the
modules while the recipe decodes: the first one computes it, the others pass
its output on. With accuracy control NNCF makes operations float again, those
that harm most first, until the WER of the search set is near enough.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..config import QuantizeConfig
from ..methods.search import Score
from ..methods.session import Recognizer
from ..runtimes.base import shadowed_forwards
from ..runtimes.cpu import cpu_class
from ..simulation.prefix_cache import StopForward
from ..utils.files import identity
from ..utils.store import Store

if TYPE_CHECKING:
    import openvino as ov

MODEL_FILE = "model.xml"
RECORD_FILE = "nncf.json"
ANSWERS_FILE = "nncf_answers.json"
PACKAGES = ("openvino", "nncf")

# So many float operations are named in a report.
NAMES = 8

# What multiplies, and how many factors it has: the operations that
# quantization is about.
PRODUCTS = {
    "MatMul": 2,
    "Convolution": 2,
    "GroupConvolution": 2,
    "ScaledDotProductAttention": 3,
}
_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split")
_DECOMPRESSION = ("Multiply", "Subtract", "Convert")

# Converting must not change the model: largest difference of the outputs, of
# their largest value.
TOLERANCE = 1e-2


def require_nncf(method: str) -> None:
    """Raises if a package is not there.

    Arguments
    ---------
    method : str
        Who needs it.

    Raises
    ------
    ValueError
        Names the extra that brings it.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"method: {method} needs package '{package}', which is not "
                "installed; run pip install 'speechbrain_stablequant[nncf]'"
            )


def require_one(utterances: int) -> None:
    """Raises unless a batch is of one utterance.

    Arguments
    ---------
    utterances : int
        Size of the batch.

    Raises
    ------
    ValueError
        It is another one: the graph knows no padding.
    """
    if utterances != 1:
        raise ValueError(
            "quantize.method: nncf takes one utterance at a time, not a batch "
            f"of {utterances}; give test_loader_kwargs a batch_size of 1"
        )


class Chain(nn.Module):
    """Modules that are called one after the other, as one.

    Arguments
    ---------
    modules : Mapping
        The modules by key, in the order of their calls.

    Example
    -------
    >>> chain = Chain({"enc": nn.Linear(1, 2), "act": nn.ReLU()})
    >>> chain(torch.zeros(3, 1)).shape
    torch.Size([3, 2])
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for key, module in modules.items():
            self.add_module(key, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the last module."""
        for module in self.children():
            x = module(x)
        return x


@dataclass(frozen=True)
class Rival:
    """A model that NNCF has quantized, on disk.

    Arguments
    ---------
    key : str
        Identifies all that it was made from.
    folder : Path
        Where its files are.
    integer, floating : tuple of str
        Names of its products: those of integers, those with a float factor.
    search : dict
        What accuracy control measured; empty without it.
    chain : Mapping
        The modules that it takes the place of, in the order of their calls.
    options : Mapping
        Of ``backend: openvino``: ``threads`` and ``precision``.
    """

    key: str
    folder: Path
    integer: tuple[str, ...]
    floating: tuple[str, ...]
    search: dict
    chain: Mapping[str, nn.Module] = field(repr=False)
    options: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of its two files."""
        return sum(path.stat().st_size for path in _files(self.folder))

    @property
    def operations(self) -> dict[str, int]:
        """How many products are computed in which arithmetic."""
        return {"integer": len(self.integer), "float": len(self.floating)}

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """What takes the place of each module's forward, newly compiled."""
        from ..runtimes.openvino_.core import core

        settings = _settings(**self.options)
        path = self.folder / MODEL_FILE
        compiled = core().compile_model(path, "CPU", settings)
        return _forwards(self.chain, compiled)

    def notes(self) -> list[str]:
        """What a reader of the report should know."""
        count = len(self.integer) + len(self.floating)
        note = f"NNCF quantized {len(self.integer)} of {count} products"
        if self.floating:
            some = ", ".join(self.floating[:NAMES])
            rest = len(self.floating) - NAMES
            more = f" and {rest} more, see {RECORD_FILE}" if rest > 0 else ""
            note += f"; in floating point are {some}{more}"
        notes = [
            f"{note}.",
            "No inference folder: an OpenVINO model of NNCF has no plan.",
        ]
        if self.search and not self.search["reached"]:
            notes.append(
                f"NNCF did not reach a rise of at most "
                f"{self.search['max_drop']:g} points on the search set: "
                f"{self.search['baseline_wer']:.2f} to "
                f"{self.search['final_wer']:.2f} %."
            )
        return notes


class Answers:
    """What accuracy control has measured, for a run that was killed.

    NNCF decides by nothing else, so whoever gets the same answers asks the
    same questions: they are told apart by their order.

    Arguments
    ---------
    store : Store
        Where they are kept.
    key : str
        Of the rival; answers under another key are forgotten.

    Example
    -------
    >>> store = Store(getfixture("tmp_path"))
    >>> Answers(store, "k").ask([0, 1], lambda: Score(2, 10, 1.0)).wer
    20.0
    >>> Answers(store, "k").ask([0, 1], None).wer
    20.0
    """

    def __init__(self, store: Store, key: str):
        self.store = store
        self.key = key
        self.known = store.read(ANSWERS_FILE, key, "NNCF's answers") or []
        self.asked = 0

    def ask(self, only: list[int], measure: Callable[[], Score]) -> Score:
        """The next answer.

        Arguments
        ---------
        only : list of int
            Utterances that the question is about.
        measure : callable
            Measures, where that is not known.

        Returns
        -------
        Score
        """
        known = self.known[self.asked : self.asked + 1]
        if known and known[0]["only"] == only:
            score = Score.from_dict(known[0]["score"])
        else:
            score = measure()
            self.known[self.asked :] = [
                {"only": only, "score": score.to_dict()}
            ]
            self.store.write(ANSWERS_FILE, self.key, self.known)
        self.asked += 1
        return score


def make_rival(
    recognizer: Recognizer,
    chain: Mapping[str, nn.Module],
    wave: torch.Tensor,
    output: torch.Tensor,
    weights: str,
    config: QuantizeConfig,
    store: Store,
) -> Rival:
    """Quantizes by NNCF, or reads what an earlier run has finished.

    Arguments
    ---------
    recognizer : Recognizer
        The float model with its calibration and search sets.
    chain : Mapping
        Its modules in the order of their calls.
    wave, output : torch.Tensor
        One input of the first module and what the last one gives.
    weights : str
        Fingerprint of the float model.
    config : QuantizeConfig
        The block.
    store : Store
        Of the folder in which the model is written.

    Returns
    -------
    Rival

    Raises
    ------
    ValueError
        A batch of several utterances, or a model that OpenVINO does not
        convert faithfully.
    """
    key = _key(recognizer, weights, config)
    folder = store.folder
    record = _read_record(store, key)
    if record is None:
        started = time.monotonic()
        model = _convert(chain, wave, output)
        waves = _calibration_waves(recognizer, next(iter(chain.values())))
        if config.method == "nncf":
            model, search = _quantize(model, waves, config), {}
        else:
            answers = Answers(store, key)
            model, search = _control(
                model, waves, recognizer, chain, config, answers
            )
            search["seconds"] = time.monotonic() - started
        # What names its files as finished is written last.
        store.delete(RECORD_FILE)
        _write(folder, model, config.float_dtype == "float16")
        integer, floating = products(model)
        record = {
            "integer": integer,
            "floating": floating,
            "search": search,
            "sha256": _checksums(folder),
        }
        store.write(RECORD_FILE, key, record)
    return Rival(
        key=key,
        folder=folder,
        integer=tuple(record["integer"]),
        floating=tuple(record["floating"]),
        search=record["search"],
        chain=dict(chain),
        options=config.backend_options,
    )


# -- what an earlier run has finished --------------------------------------


def _files(folder: Path) -> list[Path]:
    path = folder / MODEL_FILE
    return [path, path.with_suffix(".bin")]


def _checksums(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _files(folder)
    }


def _key(recognizer: Recognizer, weights: str, config: QuantizeConfig) -> str:
    content = [
        weights,
        config.method,
        config.float_dtype,
        recognizer.key("calibration", "inputs"),
        config.nncf.preset,
        [version(package) for package in PACKAGES],
    ]
    if config.needs_search:
        scores = recognizer.key("search", "scores")
        content += [scores, asdict(config.nncf)]
    return identity(content)


def _read_record(store: Store, key: str) -> dict | None:
    record = store.read(RECORD_FILE, key, "NNCF's model")
    if record is None or not all(f.exists() for f in _files(store.folder)):
        return None
    return record if record["sha256"] == _checksums(store.folder) else None


def _write(folder: Path, model: "ov.Model", half: bool) -> None:
    """Writes a model, each of its two files whole or not at all."""
    import openvino as ov

    part = folder / f"part-{MODEL_FILE}"
    ov.save_model(model, part, compress_to_fp16=half)
    for old, new in zip(
        (part, part.with_suffix(".bin")), _files(folder), strict=True
    ):
        old.replace(new)


# -- from torch to OpenVINO ------------------------------------------------


@torch.no_grad()
def _convert(
    chain: Mapping[str, nn.Module], wave: torch.Tensor, output: torch.Tensor
) -> "ov.Model":
    """The float model as a graph for one utterance of any length."""
    import openvino as ov

    from ..runtimes.openvino_.core import core

    require_one(len(wave))
    module = Chain(chain).eval()
    model = ov.convert_model(
        module, example_input=wave, input=[ov.PartialShape([1, -1])]
    )
    compiled = core().compile_model(model, "CPU", _settings(precision="f32"))
    found = _forwards(chain, compiled)[next(iter(chain.values()))](wave)
    largest = output.abs().max()
    if found.shape != output.shape or not torch.allclose(
        found, output.float(), rtol=0, atol=TOLERANCE * float(largest)
    ):
        raise ValueError(
            f"quantize.method: OpenVINO converts {', '.join(chain)} to "
            "something that gives another output; leave out method nncf"
        )
    return model


def _calibration_waves(
    recognizer: Recognizer, first: nn.Module
) -> list[np.ndarray]:
    """What the first module gets of the calibration set."""
    waves: list[np.ndarray] = []

    def keep(module: nn.Module, args: tuple) -> None:
        require_one(len(args[0]))
        waves.append(_array(args[0]))
        raise StopForward

    handle = first.register_forward_pre_hook(keep)
    try:
        recognizer.forward("calibration", lambda _: None)
    finally:
        handle.remove()
    return waves


def _array(wave: torch.Tensor) -> np.ndarray:
    return wave.detach().float().cpu().contiguous().numpy()


def _settings(
    threads: int | None = None, precision: str = "auto", **_: Any
) -> dict[str, Any]:
    """How OpenVINO computes, by the options of ``backend: openvino``."""
    if precision == "auto":
        precision = "bf16" if cpu_class().bf16 else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }


def _forwards(
    chain: Mapping[str, nn.Module], compiled: "ov.CompiledModel"
) -> dict[nn.Module, Callable[..., Any]]:
    """A graph in the place of a chain of modules."""
    request = compiled.create_infer_request()

    def compute(wave: torch.Tensor, *lengths: Any) -> torch.Tensor:
        # Of one utterance all frames are real, whatever the lengths say.
        require_one(len(wave))
        request.infer([_array(wave)], share_inputs=True)
        found = np.array(request.get_output_tensor(0).data)
        return torch.from_numpy(found).to(wave.device)

    first, *rest = chain.values()
    return {first: compute, **{module: _pass_on for module in rest}}


def _pass_on(x: torch.Tensor) -> torch.Tensor:
    return x


# -- NNCF ------------------------------------------------------------------


def _common(waves: list[np.ndarray], config: QuantizeConfig) -> dict[str, Any]:
    import nncf

    return {
        "preset": nncf.QuantizationPreset(config.nncf.preset),
        "subset_size": len(waves),
        "model_type": nncf.ModelType.TRANSFORMER,
    }


def _quantize(
    model: "ov.Model", waves: list[np.ndarray], config: QuantizeConfig
) -> "ov.Model":
    import nncf

    return nncf.quantize(model, nncf.Dataset(waves), **_common(waves, config))


def _control(
    model: "ov.Model",
    waves: list[np.ndarray],
    recognizer: Recognizer,
    chain: Mapping[str, nn.Module],
    config: QuantizeConfig,
    answers: Answers,
) -> tuple["ov.Model", dict]:
    """NNCF with accuracy control, and what it measured."""
    import nncf

    count = len(recognizer.ids("search"))
    rates: list[float] = []

    def validate(
        compiled: "ov.CompiledModel", items: Iterable[int]
    ) -> tuple[float, list[float]]:
        """The metric, of which more is better, in all and by utterance.

        NNCF divides by the float model's, so no error is not 0.
        """
        only = list(items)

        def measure() -> Score:
            with shadowed_forwards(_forwards(chain, compiled)):
                return recognizer.score(lambda _: None, None, only)

        score = answers.ask(only, measure)
        if len(only) == count:
            rates.append(score.wer)
        return 100 - score.wer, [-float(n) for n in score.utterance_errors]

    part = config.nncf
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(waves),
        nncf.Dataset(range(count)),
        validate,
        max_drop=part.max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        advanced_accuracy_restorer_parameters=(
            nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=part.ranking_utterances or count,
                # More would only depend on the machine.
                num_ranking_workers=1,
            )
        ),
        **_common(waves, config),
    )
    from ..runtimes.openvino_.core import core

    settings = _settings(precision="f32")
    compiled = core().compile_model(quantized, "CPU", settings)
    validate(compiled, range(count))
    # The float model came first.
    baseline, final = rates[0], rates[-1]
    return quantized, {
        "num_utterances": count,
        "metric": config.search.metric,
        "max_drop": part.max_drop,
        "evaluations": len(rates),
        "baseline_wer": baseline,
        "final_wer": final,
        # A drop of just so much is rounded either way.
        "reached": final - baseline <= part.max_drop + 1e-9,
    }


def products(model: "ov.Model") -> tuple[list[str], list[str]]:
    """The products of a quantized graph by their arithmetic.

    Arguments
    ---------
    model : openvino.Model
        Quantized by NNCF.

    Returns
    -------
    list of str
        Those of integers.
    list of str
        All others.
    """
    integer, floating = [], []
    for node in model.get_ordered_ops():
        count = PRODUCTS.get(node.get_type_name())
        if count is not None:
            factors = [node.input_value(i).get_node() for i in range(count)]
            found = integer if all(map(_is_integer, factors)) else floating
            found.append(_name(node))
    return integer, floating


def _is_integer(node: Any) -> bool:
    """Whether a node gives integers times a scale."""
    while node.get_type_name() in _LAYOUT:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "FakeQuantize":
        return True
    while node.get_type_name() in (*_LAYOUT, *_DECOMPRESSION):
        node = node.input_value(0).get_node()
    return (
        node.get_type_name() == "Constant"
        and node.get_element_type().is_integral()
    )


def _name(node: Any) -> str:
    """Of the module that an operation comes from."""
    name = node.get_friendly_name().removeprefix("__module.")
    return name.partition("/")[0]
