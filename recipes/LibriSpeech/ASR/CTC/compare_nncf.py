#!/usr/bin/env python3
"""Compares our W8A8 plans with models quantized by OpenVINO's NNCF.

Runs the recipe with the variants of its `quantize:` block. Then NNCF quantizes
the same checkpoint from the same calibration set, once with its defaults and
once with accuracy control, which reverts the most harmful operations to float
until the WER of the search set is near enough. The recipe decodes and scores
these models as it does ours, and they join the table in `comparison.md`.

Needs `pip install "speechbrain_stablequant[nncf]"`, a CPU and one process.
> python compare_nncf.py hparams/compare_nncf.yaml --device cpu

Authors
 * The speechbrain_stablequant developers 2026
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import train

try:
    import nncf
    import openvino as ov
except ImportError as error:
    sys.exit(f"{error}; run pip install 'speechbrain_stablequant[nncf]'")

import numpy as np
import speechbrain as sb
import torch
from torch import nn

from speechbrain_stablequant import StableQuant
from speechbrain_stablequant.brain.evaluation import evaluation_of
from speechbrain_stablequant.brain.passes import (
    FloatTurns,
    ForwardClock,
    evaluation_steps,
)
from speechbrain_stablequant.brain.run import comparison
from speechbrain_stablequant.report.comparison import (
    variant_rows,
    write_comparison,
)
from speechbrain_stablequant.report.results import (
    Effort,
    Execution,
    SetResult,
)
from speechbrain_stablequant.runtimes.cpu import cpu_class
from speechbrain_stablequant.runtimes.openvino_.core import core
from speechbrain_stablequant.utils.patching import (
    own_forwards,
    shadowed_forwards,
)

# Operations that quantization targets, and their number of factors.
PRODUCTS = {
    "MatMul": 2,
    "Convolution": 2,
    "GroupConvolution": 2,
    "ScaledDotProductAttention": 3,
}
LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split")
DECOMPRESSION = ("Multiply", "Subtract", "Convert")

# Largest difference after conversion, relative to the largest output.
TOLERANCE = 1e-2


def convert(modules: list[nn.Module], wave: torch.Tensor) -> ov.Model:
    """The modules as a graph for one utterance of any length."""
    chain = nn.Sequential(*modules).eval()
    shape = ov.PartialShape([1, -1])
    model = ov.convert_model(chain, example_input=wave, input=[shape])
    with torch.no_grad():
        wanted = chain(wave)
    found = compile_graph(model, {"precision": "f32"})(wave)
    limit = TOLERANCE * float(wanted.abs().max())
    if float((found - wanted).abs().max()) > limit:
        raise ValueError(
            "OpenVINO's conversion of the modules changes their output: NNCF "
            "cannot be compared on this model"
        )
    return model


def compile_graph(
    model: ov.Model | Path, options: Mapping[str, Any]
) -> Callable[..., torch.Tensor]:
    """A forward that computes a graph on this CPU, with ``threads`` and
    ``precision`` of ``backend_options``."""
    precision = options.get("precision", "auto")
    if precision == "auto":
        precision = "bf16" if cpu_class().bf16 else "f32"
    threads = options.get("threads") or torch.get_num_threads()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    return forward_of(core().compile_model(model, "CPU", settings))


def forward_of(compiled: ov.CompiledModel) -> Callable[..., torch.Tensor]:
    """A forward from an utterance [1, samples] to a graph's output."""
    request = compiled.create_infer_request()

    # A single utterance has no padding: lengths do not matter.
    def forward(wave: torch.Tensor, lengths: object = None) -> torch.Tensor:
        request.infer([to_array(wave)], share_inputs=True)
        return torch.from_numpy(np.array(request.get_output_tensor(0).data))

    return forward


def to_array(wave: torch.Tensor) -> np.ndarray:
    """An utterance [1, samples] as OpenVINO takes it."""
    if len(wave) != 1:
        raise ValueError(
            f"NNCF's model takes one utterance, not a batch of {len(wave)}"
        )
    return wave.detach().float().cpu().contiguous().numpy()


@contextmanager
def replaced(
    modules: list[nn.Module], forward: Callable[..., torch.Tensor]
) -> Iterator[None]:
    """Lets a graph compute modules that are called one after the other."""
    first, *rest = modules
    forwards = {module: (lambda x: x) for module in rest}
    with shadowed_forwards({first: forward, **forwards}):
        yield


def count_products(model: ov.Model) -> dict[str, int]:
    """Counts of matrix products in integer and in float arithmetic."""
    counts = {"integer": 0, "float": 0}
    for node in model.get_ordered_ops():
        factors = range(PRODUCTS.get(node.get_type_name(), 0))
        if factors:
            nodes = [node.input_value(i).get_node() for i in factors]
            counts["integer" if all(map(is_integer, nodes)) else "float"] += 1
    return counts


def is_integer(node: ov.Node) -> bool:
    """Whether a factor of a product is integers times a scale."""
    while node.get_type_name() in LAYOUT:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "FakeQuantize":
        return True
    while node.get_type_name() in (*LAYOUT, *DECOMPRESSION):
        node = node.input_value(0).get_node()
    constant = node.get_type_name() == "Constant"
    return constant and node.get_element_type().is_integral()


def check_block(hparams: Any) -> None:
    """Ends the process, before anything runs, if NNCF cannot join in."""
    block = getattr(hparams, "quantize", None)
    if block is None or not hasattr(hparams, "nncf"):
        sys.exit(
            "nncf, quantize: compare_nncf.py needs both blocks, as in "
            "hparams/compare_nncf.yaml"
        )
    sizes = {
        "test_batch_size": hparams.test_dataloader_opts["batch_size"],
        "quantize.calibration.batch_size": block.calibration.batch_size,
        "quantize.search.batch_size": block.search.batch_size,
    }
    for key, size in sizes.items():
        if size != 1:
            sys.exit(
                f"{key}: NNCF's model takes one utterance at a time; write 1, "
                f"not {size}"
            )


class Comparison:
    """Quantizes the recipe's model by NNCF, after the recipe has run."""

    def __init__(self, brain, test_datasets: dict):
        self.brain = brain
        self.tests = test_datasets
        self.options = brain.hparams.nncf
        self.stablequant: StableQuant = brain.stablequant
        self.config = self.stablequant.config
        self.modules = [brain.modules[key] for key in self.config.target]
        self.subsets = {}
        for run in self.stablequant.runs:
            self.subsets.update(run.subsets)
        waves = [b.sig.data for b in self.subsets["calibration"].load()]
        self.waves = [to_array(wave) for wave in waves]
        self.graph = convert(self.modules, waves[0].cpu())
        self.common = {
            "preset": nncf.QuantizationPreset(self.options["preset"]),
            "subset_size": len(waves),
            "model_type": nncf.ModelType.TRANSFORMER,
        }

    def quantize(self) -> ov.Model:
        """The graph as NNCF quantizes it by default."""
        data = nncf.Dataset(self.waves)
        return nncf.quantize(self.graph, data, **self.common)

    def control_accuracy(self) -> ov.Model:
        """The graph with operations reverted until the WER is near enough."""
        batches = self.subsets["search"].load()

        def validate(
            compiled: ov.CompiledModel, items: Iterable[int]
        ) -> tuple[float, list[float]]:
            rows = []
            steps = evaluation_steps(
                self.brain,
                [batches[item] for item in items],
                sb.Stage.VALID,
                self.config.metric_attribute,
            )
            with replaced(self.modules, forward_of(compiled)):
                for _, metric, size in steps:
                    rows += metric.scores[len(metric.scores) - size :]
            edits = [row["num_edits"] for row in rows]
            words = sum(row["num_ref_tokens"] for row in rows)
            # NNCF maximizes, and divides by the float model's: never 0.
            return 100 - 100 * sum(edits) / words, [-float(n) for n in edits]

        return nncf.quantize_with_accuracy_control(
            self.graph,
            nncf.Dataset(self.waves),
            nncf.Dataset(range(len(batches))),
            validate,
            max_drop=self.options["max_drop"],
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_accuracy_restorer_parameters=(
                nncf.AdvancedAccuracyRestorerParameters(
                    ranking_subset_size=self.options["ranking_utterances"]
                    or len(batches),
                    # The result must not depend on the machine.
                    num_ranking_workers=1,
                )
            ),
            **self.common,
        )

    def rows(self, name: str, searched: bool) -> list[dict]:
        """Rows of the comparison for NNCF's model, one for each test set."""
        started = time.monotonic()
        model = self.control_accuracy() if searched else self.quantize()
        sets = ["calibration", "search"] if searched else ["calibration"]
        effort = Effort(
            time.monotonic() - started,
            {key: len(self.subsets[key].ids) for key in sets},
            sets[1:],
        )
        folder = self.stablequant.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        half = self.config.float_dtype == "float16"
        file = folder / "model.xml"
        ov.save_model(model, file, compress_to_fp16=half)
        size = sum(
            path.stat().st_size for path in (file, file.with_suffix(".bin"))
        )
        forward = compile_graph(file, self.config.backend_options)
        results = {
            test: self.evaluate(test, folder, forward) for test in self.tests
        }
        return variant_rows(
            f"w8a8-{name}",
            (name, 8, 8),
            results,
            Execution("openvino", self.config.float_dtype, size),
            effort,
            count_products(model),
        )

    def evaluate(
        self, test: str, folder: Path, forward: Callable[..., torch.Tensor]
    ) -> SetResult:
        """Has the recipe evaluate a test set, as it did the float model."""
        brain, hparams = self.brain, self.brain.hparams
        hparams.test_wer_file = str(folder / f"wer_{test}.txt")
        options = dict(hparams.test_dataloader_opts)
        clock = ForwardClock(brain, "sig", self.config.sample_rate)
        total = -(-len(self.tests[test]) // options["batch_size"])
        turns = FloatTurns(clock, total, partial(own_forwards, self.modules))
        with (
            replaced(self.modules, forward),
            clock.running(),
            turns.running(),
        ):
            # The class's: the instance's would quantize once more.
            type(brain).evaluate(
                brain,
                self.tests[test],
                min_key="WER",
                test_loader_kwargs=options,
            )
        quantized = replace(
            evaluation_of(brain.wer_metric, clock), turns=turns.times
        )
        baseline = self.stablequant.runs[0].results[test].baseline
        return SetResult.pair(baseline, quantized)


def main() -> None:
    """Runs the recipe, then NNCF, and writes the joint table."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("compare_nncf.py runs in one process: leave out torchrun")
    brain, *train_sets, test_sets = train.prepare(sys.argv[1:])
    check_block(brain.hparams)
    train.run(brain, *train_sets, test_sets)
    nncf_models = Comparison(brain, test_sets)
    ours = nncf_models.stablequant
    table = comparison(ours.runs)
    table["rows"] += nncf_models.rows("nncf", searched=False)
    table["rows"] += nncf_models.rows("nncf_accuracy_control", searched=True)
    write_comparison(table, ours.folder)


if __name__ == "__main__":
    main()
