"""The rows of ``upstream.py``: upstream's recipes, and their small sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import corpora
from .models import WIDTH

#: Overrides of all recipes that have these keys.
COMMON = {
    "number_of_epochs": 1,
    "precision": "fp32",
    "eval_precision": "fp32",
    "num_workers": 0,
    "sorting": "ascending",
    "dynamic_batching": False,
    "batch_size": 4,
    "test_batch_size": 1,
    "batch_size_valid": 1,
    "batch_size_test": 1,
    "avg_checkpoints": 1,
    "augment_warmup": 0,
    "dataloader_options": {"num_workers": 0},
    "test_dataloader_options": {"num_workers": 0, "batch_size": 1},
    "valid_dataloader_opts": {"batch_size": 1},
    "test_dataloader_opts": {"batch_size": 1},
    "test_loader_kwargs": {"batch_size": 1},
}
_TRANSFORMER = {
    "d_model": WIDTH,
    "nhead": 4,
    "num_encoder_layers": 2,
    "d_ffn": 128,
    "csgu_linear_units": 128,
    "CNN": {"out_channels": [16, 8]},
    "valid_search_interval": 1,
    "valid_beam_size": 2,
    "test_beam_size": 4,
    "max_decode_ratio": 0.5,
}
_DECODER = {
    "num_decoder_layers": 2,
    "lm_model": {
        "d_model": WIDTH,
        "nhead": 4,
        "num_encoder_layers": 2,
        "d_ffn": 128,
    },
}
_RNN_LM = {"embedding_dim": 32, "rnn_neurons": 64, "dnn_neurons": 32}
_CRDNN = {
    "cnn_channels": [16, 16],
    "rnn_layers": 1,
    "rnn_neurons": 64,
    "dnn_neurons": WIDTH,
    "emb_size": 32,
    "dec_neurons": WIDTH,
    "beam_size": 4,
    "valid_beam_size": 2,
    "test_beam_size": 4,
    "max_decode_ratio": 0.5,
}
_TRANSDUCER = {
    "joint_dim": WIDTH,
    "dec_dim": WIDTH,
    "beam_size": 2,
    "lm_model": _RNN_LM,
}
_SSL = {
    "wav2vec_output_dim": WIDTH,
    "feats_dim": WIDTH,
    "dnn_neurons": WIDTH,
    "freeze_wav2vec": True,
    "enc": {"input_shape": [None, None, WIDTH]},
    "beam_size": 8,
    "test_beam_search": {"beam_size": 8},
}
_WHISPER = {"max_decode_ratio": 0.1, "test_beam_size": 2}
_CHAIN = ("wav2vec2", "enc", "ctc_lin")
_CONFORMER = ("CNN", "Transformer", "seq_lin", "ctc_lin")
_RNN = ("enc", "emb", "dec", "ctc_lin", "seq_lin")
_RNNT = ("CNN", "enc", "emb", "dec", "proj_ctc", "proj_enc", "proj_dec")
_MANIFESTS = "manifests where its preparation writes them"
_LOSS = "!name:upstream_recipes.losses.transducer_loss"


@dataclass(frozen=True)
class Row:
    """A recipe, what it is given, and how its folder loads.

    ``labels`` is what the number of outputs counts: ``chars`` of the texts
    and the blank (of a label encoder) or the unknown one (of SentencePiece),
    ``media`` for both, ``pieces``, or ``bert`` for a BERT tokenizer's.
    """

    recipe: str
    script: str
    yaml: str
    corpus: Callable[..., dict]
    target: tuple[str, ...]
    #: Manifest of the test set, below the output folder.
    manifest: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    labels: str = "pieces"
    #: What the model writes for the text of an utterance.
    texts: Callable[[str], str] = str
    #: Key of the YAML: family of the model whose folder it names.
    models: Mapping[str, str] = field(default_factory=dict)
    #: Class of SpeechBrain that loads the folder.
    loads: str = "EncoderASR"
    block: Mapping[str, Any] = field(default_factory=dict)
    #: What is not upstream's default beside sizes.
    note: str = ""


def _libri(kind: str, script: str, yaml: str, *args: Any, **kwargs: Any) -> Row:
    kwargs.setdefault("manifest", "test-clean.csv")
    recipe = f"LibriSpeech/ASR/{kind}"
    return Row(recipe, script, yaml, corpora.librispeech, *args, **kwargs)


def _voice(kind: str, script: str, yaml: str, *args: Any, **kwargs: Any) -> Row:
    recipe = f"CommonVoice/ASR/{kind}"
    kwargs.setdefault("manifest", "save/test.csv")
    return Row(recipe, script, yaml, corpora.common_voice, *args, **kwargs)


def _timit(kind: str, *args: Any, **kwargs: Any) -> Row:
    kwargs["block"] = {"metric_attribute": "per_metrics"}
    return Row(
        f"TIMIT/ASR/{kind}",
        "train.py",
        "train.yaml",
        corpora.timit,
        *args,
        manifest="save/test.json",
        **kwargs,
    )


def _transformer(yaml: str, **sizes: Any) -> Row:
    sizes = {**_TRANSFORMER, **_DECODER, **sizes}
    return _libri(
        "transformer",
        "train.py",
        yaml,
        _CONFORMER,
        sizes=sizes,
        models={"pretrained_lm_tokenizer_path": "lm"},
        loads="EncoderDecoderASR",
    )


_W2V = {"wav2vec2_hub": "Wav2Vec2"}

ROWS: dict[str, Row] = {
    "librispeech-ctc-wav2vec2": _libri(
        "CTC",
        "train_with_wav2vec.py",
        "train_hf_wav2vec.yaml",
        _CHAIN,
        sizes=_SSL,
        labels="chars",
        models=_W2V,
    ),
    "librispeech-ctc-wavlm": _libri(
        "CTC",
        "train_with_wav2vec.py",
        "downsampled/train_hf_wavlm_conv_downsampling.yaml",
        ("downsampler", *_CHAIN),
        sizes={**_SSL, "ctc_neurons": "labels"},
        labels="chars",
        models={"wav2vec2_hub": "WavLM"},
    ),
    "librispeech-ctc-whisper": _libri(
        "CTC",
        "train_with_whisper.py",
        "train_hf_whisper_encoder.yaml",
        ("whisper", "enc", "ctc_lin"),
        sizes={
            "whisper_output_dim": WIDTH,
            "dnn_neurons": WIDTH,
            "test_beam_search": {"beam_size": 8},
        },
        labels="chars",
        models={"whisper_hub": "Whisper"},
    ),
    "librispeech-ctc-conformer": _libri(
        "CTC",
        "train.py",
        "conformer_large.yaml",
        ("CNN", "Transformer", "ctc_lin"),
        sizes={**_TRANSFORMER, "beam_size": 8},
        labels="chars",
    ),
    "librispeech-ctc-branchformer": _libri(
        "CTC",
        "train.py",
        "branchformer_large.yaml",
        ("CNN", "Transformer", "ctc_lin"),
        sizes={**_TRANSFORMER, "beam_size": 8},
        labels="chars",
    ),
    "librispeech-seq2seq-crdnn": _libri(
        "seq2seq",
        "train.py",
        "train_BPE_1000.yaml",
        _RNN,
        sizes={
            **_CRDNN,
            "lm_model": _RNN_LM,
            "dec": {"attn_dim": WIDTH},
            "train_csv": "{out}/train.csv",
            "valid_csv": "{out}/dev-clean.csv",
        },
        models={"pretrained_lm_tokenizer_path": "lm"},
        loads="EncoderDecoderASR",
        note=_MANIFESTS,
    ),
    "librispeech-transformer": _transformer(
        "transformer.yaml",
        CNN={"out_channels": [8, 8, 8]},
        Transformer={"input_size": 160},
    ),
    "librispeech-conformer-small": _transformer(
        "conformer_small.yaml", Transformer={"input_size": 160}
    ),
    "librispeech-branchformer": _transformer(
        "branchformer_large.yaml", Transformer={"input_size": 160}
    ),
    "librispeech-hyperconformer": _transformer(
        "hyperconformer_8M.yaml", Transformer={"input_size": 160}
    ),
    "librispeech-whisper": _libri(
        "transformer",
        "train_with_whisper.py",
        "train_hf_whisper.yaml",
        ("whisper",),
        sizes=_WHISPER,
        models={"whisper_hub": "Whisper"},
        loads="WhisperASR",
    ),
    "librispeech-transducer": _libri(
        "transducer",
        "train.py",
        "conformer_transducer.yaml",
        (*_RNNT, "transducer_lin"),
        sizes={
            **_TRANSFORMER,
            **_TRANSDUCER,
            "Transformer": {"input_size": 160},
            "transducer_cost": _LOSS,
        },
        models={"pretrained_lm_tokenizer_path": "lm"},
        loads="EncoderDecoderASR",
        note="loss for a CPU",
    ),
    "aishell-ctc": Row(
        "AISHELL-1/ASR/CTC",
        "train_with_wav2vec.py",
        "train_with_wav2vec.yaml",
        corpora.aishell,
        _CHAIN,
        "test.csv",
        sizes=_SSL,
        labels="bert",
        models={**_W2V, "tokenizer": "bert"},
        texts=corpora.han,
        block={"metric_attribute": "cer_metric"},
    ),
    "aishell-transformer": Row(
        "AISHELL-1/ASR/transformer",
        "train.py",
        "train_ASR_transformer.yaml",
        corpora.aishell,
        _CONFORMER,
        "test.csv",
        sizes={
            **_TRANSFORMER,
            "num_decoder_layers": 2,
            "train_data": "{out}/train.csv",
            "valid_data": "{out}/dev.csv",
            "test_data": "{out}/test.csv",
            "Transformer": {"input_size": 160},
        },
        models={"tokenizer_file": "tokenizer"},
        loads="EncoderDecoderASR",
        block={"metric_attribute": "cer_metric"},
        texts=corpora.han,
        note=_MANIFESTS,
    ),
    "commonvoice-ctc": _voice(
        "CTC",
        "train_with_wav2vec.py",
        "train_en_with_wav2vec.yaml",
        _CHAIN,
        sizes=_SSL,
        labels="chars",
        models={"wav2vec2_hub": "WavLM"},
    ),
    "commonvoice-ctc-wav2vec2": _voice(
        "CTC",
        "train_with_wav2vec.py",
        "train_it_with_wav2vec.yaml",
        _CHAIN,
        sizes=_SSL,
        labels="chars",
        models=_W2V,
    ),
    "commonvoice-seq2seq": _voice(
        "seq2seq",
        "train.py",
        "train_en.yaml",
        _RNN,
        sizes={**_CRDNN, "cnn_channels": [16, 16, 16]},
        loads="EncoderDecoderASR",
    ),
    "commonvoice-transducer": _voice(
        "transducer",
        "train.py",
        "conformer_transducer.yaml",
        (*_RNNT, "transducer_lin"),
        sizes={
            **_TRANSFORMER,
            "joint_dim": WIDTH,
            "dec_dim": WIDTH,
            "Transformer": {"input_size": 160},
            "transducer_cost": _LOSS,
        },
        loads="EncoderDecoderASR",
        note="loss for a CPU",
    ),
    "commonvoice-whisper": _voice(
        "transformer",
        "train_with_whisper.py",
        "train_hf_whisper.yaml",
        ("whisper",),
        sizes=_WHISPER,
        models={"whisper_hub": "Whisper"},
        loads="WhisperASR",
    ),
    "timit-ctc": _timit(
        "CTC",
        ("model", "output"),
        sizes={**_CRDNN, "output_neurons": 14},
    ),
    "timit-seq2seq": _timit(
        "seq2seq",
        _RNN,
        sizes={**_CRDNN, "output_neurons": 16, "dec": {"attn_dim": WIDTH}},
        loads="EncoderDecoderASR",
    ),
    "timit-transducer": _timit(
        "transducer",
        ("enc", "enc_lin", "emb", "dec", "dec_lin", "output"),
        sizes={
            **_CRDNN,
            "output_neurons": 14,
            "joint_dim": WIDTH,
            "output": {"input_size": WIDTH},
            "compute_cost": _LOSS,
            "transducer_stats": {"metric": _LOSS},
        },
        loads="EncoderDecoderASR",
        note="loss for a CPU",
    ),
    "switchboard-ctc": Row(
        "Switchboard/ASR/CTC",
        "train_with_wav2vec.py",
        "train_with_wav2vec.yaml",
        corpora.switchboard,
        _CHAIN,
        "test.csv",
        sizes=_SSL,
        models=_W2V,
    ),
    "dvoice-ctc": Row(
        "DVoice/ASR/CTC",
        "train_with_wav2vec2.py",
        "train_dar_with_wav2vec.yaml",
        corpora.dvoice,
        _CHAIN,
        "save/test.csv",
        sizes=_SSL,
        labels="chars",
        models=_W2V,
    ),
    "media-ctc": Row(
        "MEDIA/ASR/CTC",
        "train_hf_wav2vec.py",
        "train_hf_wav2vec.yaml",
        corpora.media,
        ("wav2vec2", "enc", "output_lin"),
        "save/csv/test.csv",
        sizes=_SSL,
        labels="media",
        models={"wav2vec_url": "Wav2Vec2"},
        block={"metric_attribute": "cer_metric"},
    ),
    "slurp-direct": Row(
        "SLURP/direct",
        "train_with_wav2vec2.py",
        "train_with_wav2vec2.yaml",
        corpora.slurp,
        ("wav2vec2", "output_emb", "dec", "seq_lin"),
        "test-type=direct.csv",
        sizes={
            "encoder_dim": WIDTH,
            "dec_neurons": WIDTH,
            "emb_size": 32,
            "slu_beam_size": 2,
            "max_decode_ratio": 0.5,
            "dec": {"attn_dim": WIDTH},
        },
        models={"wav2vec2_hub": "Hubert", "tokenizer_file": "slurp"},
        texts=corpora.slurp_meaning,
        loads="EndToEndSLU",
    ),
    "timers-direct": Row(
        "timers-and-such/direct",
        "train.py",
        "train.yaml",
        corpora.timers,
        ("slu_enc", "output_emb", "dec", "seq_lin"),
        "test-real-type=direct.csv",
        sizes={
            "csv_train": "{out}/train-type=direct.csv",
            "csv_dev_real": "{out}/dev-real-type=direct.csv",
            "csv_dev_synth": "{out}/dev-synth-type=direct.csv",
            "csv_test_real": "{out}/test-real-type=direct.csv",
            "csv_test_synth": "{out}/test-synth-type=direct.csv",
            "csv_all_real": "{out}/all-real-type=direct.csv",
            "ASR_encoder_dim": WIDTH,
            "encoder_dim": 32,
            "dec_neurons": WIDTH,
            "emb_size": 32,
            "slu_beam_size": 2,
            "max_decode_ratio": 0.5,
            "dec": {"attn_dim": WIDTH},
        },
        models={"asr_model_source": "crdnn", "tokenizer_file": "tokenizer"},
        texts=corpora.timers_meaning,
        note=_MANIFESTS,
        loads="EndToEndSLU",
    ),
}
