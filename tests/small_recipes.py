"""Small recognizers as SpeechBrain's recipes make them, and their inference
YAMLs: random weights, some hundred thousand parameters."""

import string
from types import SimpleNamespace

import sentencepiece
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.utils.metric_stats import ErrorRateStats

FEATURES = """\
sample_rate: 16000
n_mels: 40
d_model: 48
output_neurons: 24
activation: !name:torch.nn.GELU
compute_features: !new:speechbrain.lobes.features.Fbank
    sample_rate: !ref <sample_rate>
    n_mels: !ref <n_mels>
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
CNN: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: (8, 10, 40)
    num_blocks: 2
    num_layers_per_block: 1
    out_channels: (8, 8)
    kernel_sizes: (3, 3)
    strides: (2, 2)
    residuals: (False, False)
"""

TRANSFORMER = "speechbrain.lobes.models.transformer.TransformerASR"
CONFORMER = f"""\
Transformer: !new:{TRANSFORMER}.TransformerASR
    input_size: 80
    tgt_vocab: !ref <output_neurons>
    d_model: !ref <d_model>
    nhead: 2
    num_encoder_layers: 2
    num_decoder_layers: 0
    d_ffn: 96
    activation: !ref <activation>
    encoder_module: conformer
    attention_type: RelPosMHAXL
    normalize_before: True
    causal: False
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
log_softmax: !new:torch.nn.LogSoftmax
    dim: -1
blank_index: 0
"""

CTC_RECIPE = """\
modules:
    CNN: !ref <CNN>
    Transformer: !ref <Transformer>
    ctc_lin: !ref <ctc_lin>
    normalize: !ref <normalize>
model: !new:torch.nn.ModuleList
    - [!ref <CNN>, !ref <Transformer>, !ref <ctc_lin>]
"""

CTC_INFERENCE = f"""\
pretrained_path: somewhere/else
tokenizer: !new:sentencepiece.SentencePieceProcessor
transformer_encoder: !new:{TRANSFORMER}.EncoderWrapper
    transformer: !ref <Transformer>
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    input_shape: [null, null, !ref <n_mels>]
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    cnn: !ref <CNN>
    transformer_encoder: !ref <transformer_encoder>
    ctc_lin: !ref <ctc_lin>
    log_softmax: !ref <log_softmax>
asr_model: !new:torch.nn.ModuleList
    - [!ref <CNN>, !ref <Transformer>, !ref <ctc_lin>]
modules:
    encoder: !ref <encoder>
    normalize: !ref <normalize>
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: !ref <blank_index>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        asr: !ref <asr_model>
        tokenizer: !ref <tokenizer>
    paths:
        asr: !ref <pretrained_path>/asr.ckpt
        tokenizer: !ref <pretrained_path>/tokenizer.ckpt
"""


class Recipe(sb.Brain):
    """What the classes of recipes share: greedy hypotheses are scored."""

    def compute_objectives(self, predictions, batch, stage):
        hypotheses = predictions[-1]
        self.wer_metric.append(
            batch.id,
            [self.tokenizer.decode_ids(ids).split(" ") for ids in hypotheses],
            [["A", "B"] for _ in batch.id],
        )
        return torch.zeros(())

    def on_stage_start(self, stage, epoch=None):
        self.wer_metric = ErrorRateStats()

    def features(self, batch):
        """Audio to the Transformer's input."""
        wavs, lengths = batch.sig
        features = self.hparams.compute_features(wavs)
        features = self.modules.normalize(features, lengths, epoch=3)
        return self.modules.CNN(features), lengths


class Conformer(Recipe):
    """Conformer and CTC."""

    def compute_forward(self, batch, stage):
        x, lengths = self.features(batch)
        x, _ = self.modules.Transformer(x, tgt=None, wav_len=lengths)
        scores = self.hparams.log_softmax(self.modules.ctc_lin(x))
        found = sb.decoders.ctc_greedy_decode(scores, lengths, blank_id=0)
        return scores, lengths, found


class Batch(SimpleNamespace):
    """Utterances, on the CPU."""

    def to(self, device):
        return self


def batch(count=2, seed=0):
    """Utterances of noise, the last one shorter."""
    torch.manual_seed(seed)
    lengths = torch.tensor([1.0] * (count - 1) + [0.8])
    wavs = 0.1 * torch.randn(count, 16000)
    return Batch(
        id=[str(i) for i in range(count)],
        sig=(wavs, lengths if count > 1 else torch.ones(1)),
    )


def pieces(path, size=24):
    """A SentencePiece model of some size, trained on made-up words."""
    letters = string.ascii_uppercase
    text = path / "text.txt"
    text.write_text(
        "\n".join(" ".join(a + b for a in letters) for b in letters)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path / "pieces"),
        vocab_size=size,
        model_type="char",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(path / "pieces.model"))


def make(kind, text, folder, **run_options):
    """A Brain of a recipe's YAML, with statistics and a tokenizer; its output
    folder holds the YAML as SpeechBrain resolves it."""
    torch.manual_seed(1)
    output = folder / "output"
    output.mkdir()
    text = f"output_folder: {output}\n{text}"
    resolved = resolve_references(text).getvalue()
    (output / "hyperparams.yaml").write_text(resolved)
    hparams = load_hyperpyyaml(text)
    brain = kind(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts={"device": "cpu", "noprogressbar": True, **run_options},
    )
    brain.tokenizer = pieces(folder)
    normalize = brain.modules.normalize.train()
    features = brain.hparams.compute_features(batch(8, seed=5).sig[0])
    normalize(features, torch.ones(8), epoch=0)
    brain.modules.eval()
    return brain
