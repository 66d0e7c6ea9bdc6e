"""Small recognizers as SpeechBrain's recipes make them, and their inference
YAMLs: random weights, some hundred thousand parameters."""

import string
from types import SimpleNamespace

import sentencepiece
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import nn

from speechbrain_stablequant.brain.rebuilt import describe_modules
from speechbrain_stablequant.core.layer_quant import LayerQuant
from speechbrain_stablequant.core.plan import LayerPlan, QuantizationPlan
from speechbrain_stablequant.core.quantize_layer import integer_layer
from speechbrain_stablequant.folder.stored_floats import (
    rounded_floats,
    rounded_weights,
)
from speechbrain_stablequant.folder.write import write_folder
from speechbrain_stablequant.model.layers import find_layers
from speechbrain_stablequant.runtimes.simulated import simulated_forwards
from speechbrain_stablequant.utils.patching import shadowed_forwards

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


SEQ2SEQ_RECIPE = f"""\
Transformer: !new:{TRANSFORMER}.TransformerASR
    input_size: 80
    tgt_vocab: !ref <output_neurons>
    d_model: !ref <d_model>
    nhead: 2
    num_encoder_layers: 1
    num_decoder_layers: 1
    d_ffn: 96
    activation: !ref <activation>
    encoder_module: transformer
    normalize_before: True
    causal: False
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
lm_model: !new:speechbrain.lobes.models.RNNLM.RNNLM
    output_neurons: !ref <output_neurons>
    embedding_dim: 8
    rnn_neurons: 16
    dnn_neurons: 16
    return_hidden: True
modules:
    CNN: !ref <CNN>
    Transformer: !ref <Transformer>
    seq_lin: !ref <seq_lin>
    ctc_lin: !ref <ctc_lin>
    normalize: !ref <normalize>
ctc_scorer: !new:speechbrain.decoders.scorer.CTCScorer
    eos_index: 2
    blank_index: 0
    ctc_fc: !ref <ctc_lin>
rnnlm_scorer: !new:speechbrain.decoders.scorer.RNNLMScorer
    language_model: !ref <lm_model>
    temperature: 1.15
scorer: !new:speechbrain.decoders.scorer.ScorerBuilder
    full_scorers: [!ref <rnnlm_scorer>, !ref <ctc_scorer>]
    weights:
        rnnlm: 0.3
        ctc: 0.4
test_search: !new:speechbrain.decoders.S2STransformerBeamSearcher
    modules: [!ref <Transformer>, !ref <seq_lin>]
    bos_index: 1
    eos_index: 2
    min_decode_ratio: 0.0
    max_decode_ratio: 0.3
    beam_size: 3
    using_eos_threshold: False
    length_normalization: True
    scorer: !ref <scorer>
"""

CRDNN_RECIPE = """\
enc: !new:speechbrain.lobes.models.CRDNN.CRDNN
    input_shape: [null, null, !ref <n_mels>]
    cnn_blocks: 1
    cnn_channels: (8,)
    rnn_class: !name:speechbrain.nnet.RNN.LSTM
    rnn_layers: 1
    rnn_neurons: 16
    dnn_blocks: 1
    dnn_neurons: 32
emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: !ref <output_neurons>
    embedding_dim: 8
dec: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 32
    input_size: 8
    rnn_type: gru
    attn_type: location
    hidden_size: 24
    attn_dim: 16
    num_layers: 1
    scaling: 1.0
    channels: 4
    kernel_size: 9
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 24
    n_neurons: !ref <output_neurons>
modules:
    enc: !ref <enc>
    emb: !ref <emb>
    dec: !ref <dec>
    seq_lin: !ref <seq_lin>
    normalize: !ref <normalize>
test_search: !new:speechbrain.decoders.S2SRNNBeamSearcher
    embedding: !ref <emb>
    decoder: !ref <dec>
    linear: !ref <seq_lin>
    bos_index: 1
    eos_index: 2
    min_decode_ratio: 0.15
    max_decode_ratio: 0.2
    beam_size: 3
    eos_threshold: 1.5
    temperature: 1.25
"""

TRANSDUCER_RECIPE = """\
enc: !new:{TRANSFORMER}.EncoderWrapper
    transformer: !ref <Transformer>
proj_enc: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: 32
    bias: False
proj_dec: !new:speechbrain.nnet.linear.Linear
    input_size: 24
    n_neurons: 32
    bias: False
emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: !ref <output_neurons>
    consider_as_one_hot: True
    blank_id: 0
dec: !new:speechbrain.nnet.RNN.LSTM
    input_shape: [null, null, !ref <output_neurons> - 1]
    hidden_size: 24
    num_layers: 1
Tjoint: !new:speechbrain.nnet.transducer.transducer_joint.Transducer_joint
    joint: sum
    nonlinearity: !ref <activation>
transducer_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 32
    n_neurons: !ref <output_neurons>
    bias: False
modules:
    CNN: !ref <CNN>
    enc: !ref <enc>
    emb: !ref <emb>
    dec: !ref <dec>
    Tjoint: !ref <Tjoint>
    transducer_lin: !ref <transducer_lin>
    normalize: !ref <normalize>
    proj_dec: !ref <proj_dec>
    proj_enc: !ref <proj_enc>
Beamsearcher: !new:speechbrain.decoders.transducer.TransducerBeamSearcher
    decode_network_lst: [!ref <emb>, !ref <dec>, !ref <proj_dec>]
    tjoint: !ref <Tjoint>
    classifier_network: [!ref <transducer_lin>]
    blank_id: 0
    beam_size: 1
    nbest: 1
""".replace("{TRANSFORMER}", TRANSFORMER)


# A model of HuggingFace behind another module; its folder is HUB.
HUGGINGFACE = """\
wav2vec2_hub: HUB
wav2vec2: !new:speechbrain.integrations.huggingface.wav2vec2.Wav2Vec2
    source: !ref <wav2vec2_hub>
    save_path: !ref <wav2vec2_hub>/save
pool: !new:torch.nn.AvgPool1d
    kernel_size: 2
    stride: 1
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 32
    n_neurons: 24
"""

HUGGINGFACE_RECIPE = """\
modules:
    wav2vec2: !ref <wav2vec2>
    pool: !ref <pool>
    ctc_lin: !ref <ctc_lin>
"""

HUGGINGFACE_INFERENCE = """\
tokenizer: !new:sentencepiece.SentencePieceProcessor
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    input_shape: [null, null]
    pool: !ref <pool>
    wav2vec2: !ref <wav2vec2>
    ctc_lin: !ref <ctc_lin>
modules:
    encoder: !ref <encoder>
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
"""


WHISPER_CTC = """\
whisper: !new:speechbrain.integrations.huggingface.whisper.Whisper
    source: HUB
    save_path: HUB/save
    encoder_only: True
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 16
    n_neurons: 24
modules:
    whisper: !ref <whisper>
    ctc_lin: !ref <ctc_lin>
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


class BeamConformer(Recipe):
    """Conformer, and a beam search of the script's own."""

    def compute_forward(self, batch, stage):
        x, lengths = self.features(batch)
        x, _ = self.modules.Transformer(x, tgt=None, wav_len=lengths)
        scores = self.hparams.log_softmax(self.modules.ctc_lin(x))
        pieces = self.tokenizer.id_to_piece(list(range(24)))
        search = CTCBeamSearcher(
            blank_index=0,
            vocab_list=pieces,
            beam_size=5,
            token_prune_min_logp=-12.0,
        )
        found = search(scores, lengths)
        return scores, [self.tokenizer.encode_as_ids(x[0].text) for x in found]


class Bert:
    """What a recipe for Chinese uses of BERT's tokenizer."""

    cls_token, sep_token, pad_token = "[CLS]", "[SEP]", "[PAD]"

    def __init__(self):
        self.labels = ["[PAD]", *string.ascii_uppercase[:23]]
        # Where the random weights have their peaks.
        self.labels[7], self.labels[15] = "[SEP]", "[CLS]"


class MarkedConformer(Recipe):
    """A beam search over labels of which some are no text."""

    def compute_forward(self, batch, stage):
        x, lengths = self.features(batch)
        x, _ = self.modules.Transformer(x, tgt=None, wav_len=lengths)
        scores = self.hparams.log_softmax(self.modules.ctc_lin(x))
        search = CTCBeamSearcher(0, self.tokenizer.labels, beam_size=5)
        return scores, [x[0].text for x in search(scores, lengths)]

    def compute_objectives(self, predictions, batch, stage):
        texts = predictions[-1]
        for marker in ("[CLS]", "[SEP]", "[PAD]"):
            texts = [text.replace(marker, "") for text in texts]
        self.wer_metric.append(batch.id, texts, [["A"] for _ in texts])
        return torch.zeros(())


class HuggingFace(Recipe):
    """A model of HuggingFace that gets something other than the audio."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.sig
        x = self.modules.wav2vec2(self.modules.pool(wavs), lengths)
        scores = self.modules.ctc_lin(x)
        found = sb.decoders.ctc_greedy_decode(scores, lengths, blank_id=0)
        return scores, found


class WhisperCTC(Recipe):
    """The encoder of a Whisper with a CTC head."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.sig
        scores = self.modules.ctc_lin(self.modules.whisper(wavs))
        found = sb.decoders.ctc_greedy_decode(scores, lengths, blank_id=0)
        return scores, found


class Seq2Seq(Recipe):
    """Transformer with a decoder, which sees the transcript as well."""

    def compute_forward(self, batch, stage):
        x, lengths = self.features(batch)
        tokens = torch.ones(len(x), 3, dtype=torch.long)
        x, scores = self.modules.Transformer(x, tokens, lengths, pad_idx=0)
        scores = self.modules.seq_lin(scores)
        self.modules.ctc_lin(x)
        found, *_ = self.hparams.test_search(x.detach(), lengths)
        return scores, found


class CRDNN(Recipe):
    """CRDNN with an attentional decoder."""

    def compute_forward(self, batch, stage):
        wavs, lengths = batch.sig
        features = self.hparams.compute_features(wavs)
        features = self.modules.normalize(features, lengths)
        x = self.modules.enc(features.detach())
        tokens = torch.ones(len(x), 3, dtype=torch.long)
        h, _ = self.modules.dec(self.modules.emb(tokens), x, lengths)
        scores = self.modules.seq_lin(h)
        found, *_ = self.hparams.test_search(x, lengths)
        return scores, found


class Transducer(Recipe):
    """Conformer with a transducer."""

    def compute_forward(self, batch, stage):
        x, lengths = self.features(batch)
        x = self.modules.enc(x, lengths, pad_idx=0, dynchunktrain_config=None)
        x = self.modules.proj_enc(x)
        h, _ = self.modules.dec(self.modules.emb(torch.ones(2, 3).long()))
        h = self.modules.proj_dec(h)
        joint = self.modules.Tjoint(x.unsqueeze(2), h.unsqueeze(1))
        scores = self.modules.transducer_lin(joint)
        found, *_ = self.hparams.Beamsearcher(x)
        return scores, found


class Batch(SimpleNamespace):
    """Utterances, on the CPU."""

    def to(self, device):
        return self


def batch(count=2, seed=0):
    """Utterances of noise, the last one shorter."""
    # Threads call this together: the global random state is not theirs.
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1.0] * (count - 1) + [0.8])
    wavs = 0.1 * torch.randn(count, 16000, generator=generator)
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
    if "normalize" in brain.modules:
        normalize = brain.modules.normalize.train()
        features = brain.hparams.compute_features(batch(8, seed=5).sig[0])
        normalize(features, torch.ones(8), epoch=0)
    brain.modules.eval()
    if kind is CRDNN:
        # As they are made, the weights of its decoder say nothing.
        torch.manual_seed(0)
        for key, size in (("seq_lin", 0.7), ("dec", 0.3)):
            for parameter in brain.modules[key].parameters():
                nn.init.normal_(parameter, std=size)
    return brain


def folder_of(brain, config, folder):
    """Writes a Brain's folder; returns what the simulation hears."""
    modules = dict(brain.modules.items())
    layers = find_layers(modules, config.target, exclude=config.exclude)
    names = [layer.name for layer in layers]
    source, modules = describe_modules(brain, batch(), config, names)
    quant = LayerQuant(8, 8, 4.0)
    rows = [
        LayerPlan(x.name, x.unit, x.kind, quant, 4.0, 100.0, "") for x in layers
    ]
    plan = QuantizationPlan("max", 8, 8, "", {}, {}, [], rows)
    folder.mkdir()
    with rounded_floats(modules, names, "float16"):
        integers = {x.name: integer_layer(x, quant) for x in layers}
    with (
        rounded_floats(modules, names, "float16"),
        rounded_weights(modules, integers),
    ):
        forwards = simulated_forwards(dict(brain.modules.items()), integers)
        with shadowed_forwards(forwards), torch.no_grad():
            *_, ids = brain.compute_forward(batch(), None)
    assert write_folder(folder, modules, plan, integers, "float16", source)
    return [brain.tokenizer.decode_ids(x) for x in ids]


def transcripts(asr) -> list[str]:
    """What a recognizer hears in the batch."""
    return asr.transcribe_batch(*batch().sig)[0]
