"""Times captured encoders, beside their modules, the same graph in float, and
that quantized by NNCF; all take turns.

Example
-------
python tests/benchmarks/captured.py --model conformer --seconds 10 --rounds 5
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import openvino as ov
import torch
from harness import machine
from torch import nn

from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.model.layers import find_layers, visible_layers
from speechbrain_stablequant.runtimes.captured.calls import Call, Signature
from speechbrain_stablequant.runtimes.captured.capture import (
    capture,
    capture_part,
)
from speechbrain_stablequant.runtimes.captured.executor import (
    CapturedExecutor,
    part_forward,
)
from speechbrain_stablequant.runtimes.captured.sites import Sites
from speechbrain_stablequant.runtimes.cpu import cpu_class, executed_integers
from speechbrain_stablequant.utils.patching import hooked


def conformer(layers: int = 18) -> tuple[nn.Module, Callable]:
    """The encoder of SpeechBrain's Conformer CTC, 28 M parameters, behind the
    convolutions."""
    from speechbrain.lobes.models.transformer.TransformerASR import (
        EncoderWrapper,
        TransformerASR,
    )

    model = TransformerASR(
        input_size=640,
        tgt_vocab=31,
        d_model=256,
        nhead=4,
        num_encoder_layers=layers,
        num_decoder_layers=0,
        d_ffn=1024,
        activation=nn.GELU,
        encoder_module="conformer",
        attention_type="RelPosMHAXL",
        normalize_before=True,
        causal=False,
    )

    def inputs(seconds: float) -> tuple:
        return torch.randn(1, round(seconds * 25), 640), torch.ones(1)

    return EncoderWrapper(model), inputs


def wavlm_base() -> tuple[nn.Module, Callable]:
    """The shape of WavLM-base, from audio."""
    from transformers import WavLMConfig, WavLMModel

    model = WavLMModel(WavLMConfig())
    return model, lambda seconds: (torch.randn(1, round(seconds * 16000)),)


def wavlm_large() -> tuple[nn.Module, Callable]:
    """The shape of WavLM-Large, from audio."""
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
    )
    model = WavLMModel(config)
    return model, lambda seconds: (torch.randn(1, round(seconds * 16000)),)


def whisper_encoder(folder: str) -> tuple[nn.Module, Callable]:
    """The encoder of a Whisper folder, which takes 30 s."""
    from transformers import WhisperModel

    model = WhisperModel.from_pretrained(folder, dtype=torch.float32)
    return model.encoder, lambda seconds: (torch.randn(1, 80, 3000),)


MODELS = {
    "conformer": conformer,
    "wavlm-base": wavlm_base,
    "wavlm-large": wavlm_large,
}


@torch.no_grad()
def quantized(model: nn.Module, call: Call) -> dict:
    """Integers by layer, with the ranges of one call."""
    layers, ranges = find_layers({"enc": model}, ["enc"]), {}

    def observe(name: str) -> Callable:
        def hook(_, args: tuple) -> None:
            top = float(args[0].abs().max())
            ranges[name] = max(ranges.get(name, 0.0), top)

        return hook

    with (
        visible_layers(layers),
        hooked((layer.module, observe(layer.name)) for layer in layers),
    ):
        model(*call.args)
    made = {
        layer.name: integer_layer(layer, LayerQuant(8, 8, ranges[layer.name]))
        for layer in layers
        if layer.name in ranges
    }
    return executed_integers(made, cpu_class())


def by_nncf(model: ov.Model, inputs: list[torch.Tensor]) -> ov.Model:
    """The graph as NNCF quantizes it."""
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset([[x.numpy() for x in inputs]]),
        subset_size=1,
        model_type=nncf.ModelType.TRANSFORMER,
    )


@torch.no_grad()
def ways(
    model: nn.Module, inputs: Callable, seconds: float, threads: int
) -> Iterator[tuple[str, Callable]]:
    """What is timed, by name; each takes the seconds of its input."""
    calls = [Call(inputs(s), {}) for s in (seconds, seconds * 0.6)]
    yield "torch_fp32", lambda s: model(*inputs(s))
    integers = quantized(model, calls[0])
    start = time.perf_counter()
    part = capture_part("enc", model, calls, integers)
    print(f"captured by {part.way} in {time.perf_counter() - start:.1f} s")
    signature = Signature.loads(part.structure, part.leaves)

    def float_graph():
        return capture(model, signature, part.way, Sites({"enc": model}, {}))

    def execute(executor: CapturedExecutor) -> Callable:
        return lambda s: executor(list(inputs(s)))

    plain = float_graph()
    yield (
        "openvino_fp32",
        execute(CapturedExecutor(plain, threads=threads, precision="f32")),
    )
    if cpu_class().bf16:
        yield (
            "openvino_bf16",
            execute(
                CapturedExecutor(
                    float_graph(), threads=threads, precision="bf16"
                )
            ),
        )
    try:
        graph = plain._replace(
            model=by_nncf(float_graph().model, calls[0].args)
        )
        yield "openvino_nncf", execute(CapturedExecutor(graph, threads=threads))
    except Exception as error:
        print(f"openvino_nncf: {error}")
    ours = part_forward(part, model, integers, threads=threads)
    yield "ours", lambda s: ours(*inputs(s))


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model", default="conformer", help=f"{', '.join(MODELS)}, FOLDER"
    )
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--new", action="store_true", help="another length in each round"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    make = MODELS.get(options.model)
    model, inputs = make() if make else whisper_encoder(options.model)
    model.eval()
    inputs = functools.cache(inputs)  # random
    print(machine("cpu") | {"cpu_class": cpu_class().name})
    timed = dict(ways(model, inputs, options.seconds, options.threads))
    times: dict[str, list[float]] = {name: [] for name in timed}
    with torch.no_grad():
        for turn in range(options.rounds + 1):
            seconds = options.seconds + 0.08 * turn * options.new
            for name, run in timed.items():
                start = time.perf_counter()
                run(seconds)
                if turn:
                    times[name].append(time.perf_counter() - start)
    base = statistics.median(times["torch_fp32"])
    for name, rows in times.items():
        median = statistics.median(rows)
        print(
            f"{name:15} {median * 1e3:8.1f} ms  {base / median:5.2f}  "
            f"best {min(rows) * 1e3:8.1f}"
        )


if __name__ == "__main__":
    main()
