"""Small models in the files that upstream's recipes load: HuggingFace folders
with random weights, tokenizers, language models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

#: Width of each small model.
WIDTH = 64
_SSL = {
    "num_attention_heads": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    # Short speech has fewer frames than the default mask.
    "mask_time_length": 2,
}


def ssl_folder(folder: Path, family: str, scale: int) -> None:
    """A wav2vec 2.0, HuBERT or WavLM model in the shape of the large ones."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "conv_dim": (WIDTH // 2 * scale,) * 7,
        "hidden_size": WIDTH * scale,
        "num_hidden_layers": layers(scale),
        "intermediate_size": 2 * WIDTH * scale,
    }
    config = getattr(transformers, f"{family}Config")(**_SSL, **sizes)
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=True, return_attention_mask=True
    )
    extractor.save_pretrained(folder)


def layers(scale: int) -> int:
    """Layers of an encoder or a decoder."""
    return 2 if scale == 1 else 6


def whisper_folder(folder: Path, scale: int) -> None:
    """A multilingual Whisper; its tokenizer spells bytes."""
    import transformers

    torch.manual_seed(0)
    vocabulary, special = _whisper_tokens()
    end, start = vocabulary["<|endoftext|>"], special["<|startoftranscript|>"]
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary) + len(special),
        d_model=WIDTH * scale,
        encoder_layers=layers(scale),
        decoder_layers=layers(scale),
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH * scale,
        decoder_ffn_dim=2 * WIDTH * scale,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    tokenizer = transformers.WhisperTokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
    )
    tokenizer.save_pretrained(folder)
    # Looked for beside the tokenizer; no spellings are changed.
    (folder / "normalizer.json").write_text("{}")


def _whisper_tokens() -> tuple[dict[str, int], dict[str, int]]:
    """The ids of OpenAI's multilingual models; letters for words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    words = sorted(ByteLevel.alphabet())
    words += [f"w{i}" for i in range(50257 - len(words))]
    vocabulary = {word: i for i, word in enumerate([*words, "<|endoftext|>"])}
    names = ["startoftranscript", *list(LANGUAGES)[:99], "translate"]
    names += ["transcribe", "startoflm", "startofprev", "nospeech"]
    names += ["notimestamps", *(f"{i * 0.02:.2f}" for i in range(1501))]
    first = len(vocabulary)
    return vocabulary, {f"<|{n}|>": first + i for i, n in enumerate(names)}


def bert_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """A BERT tokenizer of the characters of some texts; returns its size."""
    import transformers

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += sorted({c for text in texts for c in text if c.strip()})
    vocabulary = {token: i for i, token in enumerate(tokens)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    file = folder / "vocab.txt"
    file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


def vocabulary_size(texts: Sequence[str]) -> int:
    """A size for which few texts suffice: characters, specials, a few more."""
    return len({c for text in texts for c in text}) + 6


def sentencepiece(path: Path, texts: Sequence[str], **options: int) -> int:
    """Train SpeechBrain's tokenizer; returns its size."""
    from speechbrain.tokenizers.SentencePiece import SentencePiece

    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "texts.json"
    rows = {str(i): {"wrd": text} for i, text in enumerate(texts)}
    table.write_text(json.dumps(rows), encoding="utf-8")
    size = vocabulary_size(texts)
    SentencePiece(
        str(folder),
        size,
        str(table),
        "wrd",
        annotation_format="json",
        **options,
    )
    (folder / f"{size}_unigram.model").rename(path)
    return size


def language_model(recipe: Path, overrides: Mapping, path: Path) -> None:
    """Save the ``lm_model`` of a recipe's YAML with its random weights."""
    from hyperpyyaml import load_hyperpyyaml

    torch.manual_seed(0)
    text = recipe.read_text(encoding="utf-8")
    # What the language model does not refer to is not made.
    keep = load_hyperpyyaml(text, dict(overrides))["lm_model"]
    torch.save(keep.state_dict(), path)


def crdnn_folder(folder: Path, texts: Sequence[str]) -> None:
    """A recognizer in the Hub's layout, which a recipe listens with."""
    from hyperpyyaml import load_hyperpyyaml

    folder.mkdir(parents=True, exist_ok=True)
    size = sentencepiece(folder / "tokenizer.ckpt", texts)
    text = _CRDNN.format(folder=folder, size=size)
    (folder / "hyperparams.yaml").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    hparams = load_hyperpyyaml(text)
    torch.save(hparams["asr_model"].state_dict(), folder / "asr.ckpt")


_CRDNN = """\
sample_rate: 16000
bos_index: 0
eos_index: 0
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 40
normalizer: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
enc: !new:speechbrain.lobes.models.CRDNN.CRDNN
    input_shape: [null, null, 40]
    cnn_channels: (8, 8)
    rnn_neurons: 32
    rnn_layers: 1
    dnn_neurons: 64
emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: {size}
    embedding_dim: 16
dec: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 64
    input_size: 16
    rnn_type: gru
    attn_type: location
    hidden_size: 32
    attn_dim: 32
    num_layers: 1
    scaling: 1.0
    channels: 4
    kernel_size: 10
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 32
    n_neurons: {size}
asr_model: !new:torch.nn.ModuleList
    - [!ref <enc>, !ref <emb>, !ref <dec>, !ref <seq_lin>]
tokenizer: !new:sentencepiece.SentencePieceProcessor
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    input_shape: [null, null, 16000]
    compute_features: !ref <compute_features>
    normalize: !ref <normalizer>
    model: !ref <enc>
decoder: !new:speechbrain.decoders.S2SRNNBeamSearcher
    embedding: !ref <emb>
    decoder: !ref <dec>
    linear: !ref <seq_lin>
    bos_index: 0
    eos_index: 0
    min_decode_ratio: 0.0
    max_decode_ratio: 0.2
    beam_size: 2
modules:
    encoder: !ref <encoder>
    decoder: !ref <decoder>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        asr: !ref <asr_model>
        tokenizer: !ref <tokenizer>
    paths:
        asr: {folder}/asr.ckpt
        tokenizer: {folder}/tokenizer.ckpt
"""
