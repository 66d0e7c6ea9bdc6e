"""How far runtimes are from the probe of a folder: whole ones, and ones with a
fault put into them on purpose.

Each fault is one layer, or all layers of one shape, that a runtime computes
wrong: scales off by two, two rows of a weight that have changed places, a
kernel that is one step off. A ratio above 1 is an alarm. With a split, the
change of the word error rate is measured for each fault that the probe does not
find.

Example
-------
python tests/benchmarks/faults.py results/quant/1986/quantized --loads 20
python tests/benchmarks/faults.py results/quant/1986/quantized \
    --backends torch_int8 --faults scale rows kernel \
    --split recipes/LibriSpeech/ASR/CTC/demo/LibriSpeech/test-demo
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from wer import transcribe, utterances

from speechbrain_stablequant import Recognizer, load
from speechbrain_stablequant.core.error_rates import score
from speechbrain_stablequant.core.integer_layer import IntegerLayer
from speechbrain_stablequant.runtimes.build import (
    build_forwards,
    executed_form,
    rounds_to_half,
)
from speechbrain_stablequant.runtimes.probe import Distance, chain
from speechbrain_stablequant.runtimes.registry import select_options

Integers = Mapping[str, IntegerLayer]


def twice_the_scale(layer: IntegerLayer) -> IntegerLayer:
    """A scale that is off by two."""
    return replace(layer, weight_scale=2 * layer.weight_scale)


def swapped_rows(layer: IntegerLayer) -> IntegerLayer:
    """The first two rows in each other's place."""
    layer = layer.loaded()
    order = torch.arange(len(layer.weight))
    order[[0, 1]] = order[[1, 0]]
    return replace(
        layer,
        weight=layer.weight[order],
        weight_scale=layer.weight_scale[order],
    )


def one_step_off(layer: IntegerLayer) -> IntegerLayer:
    """Weights one place further: what a kernel does that counts wrong."""
    layer = layer.loaded()
    return replace(layer, weight=layer.weight.roll(1, -1))


FAULTS: dict[str, Callable[[IntegerLayer], IntegerLayer]] = {
    "scale": twice_the_scale,
    "rows": swapped_rows,
    "kernel": one_step_off,
}


def faulty(integers: Integers, kind: str) -> Iterator[tuple[str, Integers]]:
    """Integers with a fault of a kind, and where it is: each layer in turn,
    or for a kernel all layers that it computes."""
    change = FAULTS[kind]
    if kind != "kernel":
        for name, layer in integers.items():
            yield name, {**integers, name: change(layer)}
        return
    shapes: dict[tuple, list[str]] = {}
    for name, layer in integers.items():
        shapes.setdefault((*layer.weight.shape, layer.groups), []).append(name)
    for shape, names in shapes.items():
        wrong = {name: change(integers[name]) for name in names}
        yield f"all of shape {shape}", {**integers, **wrong}


def distances(
    asr: Recognizer, backend: str, integers: Integers, install: bool
) -> dict[str, Distance]:
    """How far a runtime is from the probe with some integers, without an
    alarm; it may then transcribe."""
    model = asr.model
    device = next(model.parameters()).device
    model._remove_forwards()
    parts = dict(model.parts.items())
    options = select_options(backend, model.options)
    peak = model.plan.residual_amax
    forwards = build_forwards(
        backend, parts, integers, residual_amax=peak, **options
    )
    compute = chain(parts, model._use_lengths, forwards)
    found = model.probe.compare(
        compute,
        executed_form(backend),
        device,
        rounds_to_half(backend, options),
    )
    if install:
        for module, forward in forwards.items():
            module.forward = forward
    return found


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measures, and prints a line for each load or fault; returns the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", help="that a run has written")
    parser.add_argument("--backends", nargs="+", default=["torch_int8"])
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--loads", type=int, default=1)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=[])
    parser.add_argument("--split", type=Path, help="to measure the WER on")
    parser.add_argument("--utterances", type=int, help="only so many")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(argv)
    logging.getLogger("speechbrain_stablequant").setLevel(logging.ERROR)
    items = utterances(args.split)[: args.utterances] if args.split else []
    rows: list[dict] = []

    def note(**row) -> None:
        rows.append(row)
        words = (f"{key} {value}" for key, value in row.items())
        print(" ".join(words), flush=True)

    for folder in args.folders:
        for backend in args.backends:
            worst = {"encoder": 0.0, "head": 0.0}
            for turn in range(args.loads):
                torch.set_num_threads(args.threads[turn % len(args.threads)])
                asr = load(folder, backend, backend_options=args.options)
                integers = asr.model._integers
                found = distances(asr, backend, integers, bool(items))
                for place, distance in found.items():
                    worst[place] = max(worst[place], distance.ratio)
            rate = wer(asr, items)
            ratios = {key: round(value, 3) for key, value in worst.items()}
            note(folder=folder, backend=backend, fault="none", **ratios, **rate)
            for kind in args.faults:
                for where, wrong in faulty(integers, kind):
                    found = distances(asr, backend, wrong, bool(items))
                    ratios = {k: round(d.ratio, 2) for k, d in found.items()}
                    unseen = max(ratios.values()) <= 1
                    row = wer(asr, items) if unseen else {}
                    if row:
                        row["delta"] = round(row["wer"] - rate["wer"], 2)
                    note(backend=backend, fault=kind, at=where, **ratios, **row)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    return rows


def wer(asr: Recognizer, items: Sequence[tuple[Path, str]]) -> dict:
    """The word error rate, where there is something to transcribe."""
    if not items:
        return {}
    made, _ = transcribe(asr, items, 1, "words")
    return {"wer": round(score(made).wer, 2)}


if __name__ == "__main__":
    main()
