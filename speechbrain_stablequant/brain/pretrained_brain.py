"""A Brain around one of SpeechBrain's pretrained recognizers."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import speechbrain as sb
import torch
from speechbrain.dataio import audio_io
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.decoders.seq2seq import S2SBaseSearcher
from speechbrain.inference.interfaces import Pretrained
from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
from speechbrain.nnet.losses import ctc_loss, nll_loss
from speechbrain.utils.metric_stats import ErrorRateStats
from torch import nn

from ..utils.digest import digest
from ..utils.patching import shadowed
from .inference_yaml import contents_of

# Of the source's keys, what would mislead a Brain or its folder.
_NOT_A_RECIPES = ("modules", "pretrainer", "savedir", "output_folder")


class Recognizer:
    """One of SpeechBrain's classes, and how references are written for it."""

    def __init__(
        self, pretrained: Pretrained, normalize: Callable[[str], str] | None
    ):
        self.pretrained = pretrained
        self._normalize = normalize or str
        hparams = vars(pretrained.hparams)
        # WhisperASR reads it, and older YAMLs do not have it.
        self.normalizes = hparams.setdefault("normalized_transcripts", False)
        # Modules that nothing loads or uses may be random.
        used = [type(pretrained), self.hparams, pretrained.mods, normalize]
        self._content = digest(used)
        labels = self.hparams["tokenizer"]
        known = hasattr(labels, "expected_len")
        if isinstance(labels, CTCTextEncoder) and not known:
            # As the first decoding does, but that it warns.
            labels.ignore_len()

    def to_str(self) -> str:
        """What it was when it was loaded: keys of measurements have it."""
        return self._content

    @property
    def chain(self) -> dict[str, nn.Module]:
        """The modules of a greedy CTC recognizer that begins with a wav2vec 2.0
        or HuBERT, without a softmax at its end; empty for others."""
        parts = self.pretrained.mods
        if set(parts) != {"encoder"} or self.blank_index is None:
            return {}
        chain = list(getattr(parts["encoder"], "items", dict)())
        if not chain or not isinstance(chain[0][1], Wav2Vec2):
            return {}
        while not any(True for _ in chain[-1][1].parameters()):
            chain.pop()
        return dict(chain)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules as a recipe has them: a chain, or the smallest of the
        YAML that hold what its `modules` do."""
        if self.chain:
            return self.chain
        named = {
            key: value
            for key, value in vars(self.pretrained.hparams).items()
            if isinstance(value, nn.Module)
        }
        parts = {k: v for k, v in self.pretrained.mods.items() if v is not None}
        keys = sorted(named, key=lambda key: len(list(named[key].modules())))
        found: dict[str, nn.Module] = {}
        covered: set[int] = set()
        for key, module in (*((k, named[k]) for k in keys), *parts.items()):
            if not contents_of(module) <= covered:
                found[key] = module
                covered |= contents_of(module)
        return {k: found[k] for k in (*named, *parts) if k in found}

    @property
    def used(self) -> list[str]:
        """Keys of the modules that are part of what computes."""
        inside = {id(x) for x in self.pretrained.mods.modules()}
        return [k for k, module in self.modules.items() if id(module) in inside]

    @property
    def hparams(self) -> dict[str, Any]:
        """The values of the YAML, without modules."""
        found = {
            key: value
            for key, value in vars(self.pretrained.hparams).items()
            if key not in _NOT_A_RECIPES and not isinstance(value, nn.Module)
        }
        found["tokenizer"] = self.pretrained.tokenizer
        if self.blank_index is not None:
            found["blank_index"] = self.blank_index
        return found

    @property
    def blank_index(self) -> int | None:
        """The blank of a greedy CTC decoding."""
        function = getattr(self.pretrained, "decoding_function", None)
        return getattr(function, "keywords", {}).get("blank_id")

    @property
    def searcher(self) -> nn.Module | None:
        """What decodes token by token."""
        return getattr(self.pretrained.mods, "decoder", None)

    def load_audio(self, path: str) -> torch.Tensor:
        """Samples of a file, resampled and mixed as the source says."""
        wave, rate = audio_io.load(path, channels_first=False)
        return self.pretrained.audio_normalizer(wave, rate)

    def transcribe(
        self, wavs: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, list[str]]:
        """The encoder's output, and what the class recognizes from it."""
        encoded = self.pretrained.encode_batch(wavs, lengths)
        with shadowed(self.pretrained, "encode_batch", lambda *_: encoded):
            found, _ = self.pretrained.transcribe_batch(wavs, lengths)
        texts = [x if isinstance(x, str) else " ".join(x) for x in found]
        return encoded, texts

    def reference(self, text: str) -> str:
        """A reference as it is compared with what is recognized."""
        text = self._normalize(text)
        if self.normalizes:
            text = self.pretrained.tokenizer.normalize(text)
        return text

    @property
    def has_loss(self) -> bool:
        """Whether the loss of references can be computed."""
        kind = isinstance(self.searcher, S2SBaseSearcher)
        return kind or self.blank_index is not None

    def log_probabilities(
        self, encoded: torch.Tensor, lengths: torch.Tensor, texts: Sequence[str]
    ) -> torch.Tensor:
        """Of the labels of each frame, or, where tokens are decoded one after
        the other, of what follows each token of the references; else the
        encoder's output."""
        if self.blank_index is not None:
            scores = encoded.float()
            sums = scores.logsumexp(-1)
            # Most sources end with a softmax.
            done = torch.allclose(sums, torch.zeros_like(sums), atol=1e-3)
            return scores if done else scores.log_softmax(-1)
        if not self.has_loss:
            return encoded
        rows = [self._ids(text) for text in texts]
        return teacher_forced(self.searcher, encoded, lengths, rows)

    def loss(
        self, scores: torch.Tensor, lengths: torch.Tensor, texts: Sequence[str]
    ) -> torch.Tensor:
        """The loss of references, 0 if it cannot be computed."""
        if not self.has_loss:
            return torch.zeros(())
        rows = [self._ids(text) for text in texts]
        if self.blank_index is None:
            rows = [[*row, self.searcher.eos_index] for row in rows]
        tokens, parts = (x.to(scores.device) for x in padded(rows, 0))
        if self.blank_index is None:
            return nll_loss(scores, tokens, parts)
        lengths = lengths.to(scores.device)
        return ctc_loss(scores, tokens, lengths, parts, self.blank_index)

    def _ids(self, text: str) -> list[int]:
        """Labels of a text, without characters that have none."""
        tokenizer = self.pretrained.tokenizer
        if isinstance(tokenizer, CTCTextEncoder):
            known = tokenizer.lab2ind
            return [known[char] for char in text if char in known]
        if hasattr(tokenizer, "encode_as_ids"):
            return tokenizer.encode_as_ids(text)
        return tokenizer.encode(text, add_special_tokens=False)


def padded(
    rows: Sequence[Sequence[int]], fill: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [batch, longest], and relative lengths [batch]."""
    longest = max(1, *map(len, rows))
    tokens = [[*row, *[fill] * (longest - len(row))] for row in rows]
    parts = [len(row) / longest for row in rows]
    return torch.tensor(tokens), torch.tensor(parts)


def teacher_forced(
    searcher: S2SBaseSearcher,
    encoded: torch.Tensor,
    lengths: torch.Tensor,
    rows: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Log probabilities [batch, tokens, labels] of the first token, and of what
    follows each token, in one pass of the decoder."""
    prompt = list(getattr(searcher, "initial_tokens", [searcher.bos_index]))
    inputs, _ = padded([[*prompt, *x] for x in rows], searcher.eos_index)
    inputs, lengths = inputs.to(encoded.device), lengths.to(encoded.device)
    if hasattr(searcher, "dec"):
        out, _ = searcher.dec(searcher.emb(inputs), encoded, lengths)
    elif hasattr(searcher.model, "forward_decoder"):
        out, *_ = searcher.model.forward_decoder(encoded, inputs)
    else:
        frames = (encoded.shape[1] * lengths).round().int()
        out, _ = searcher.model.decode(inputs, encoded, frames)
    if getattr(searcher, "fc", None) is not None:
        out = searcher.fc(out)
    return out[:, len(prompt) - 1 :].float().log_softmax(-1)


class PretrainedBrain(sb.Brain):
    """Recognizes as the class of its ``recognizer`` does."""

    #: There is no validation set.
    drawn_from = "manifest"

    def __init__(self, recognizer: Recognizer, run_opts: Mapping[str, Any]):
        modules, hparams = recognizer.modules, recognizer.hparams
        super().__init__(modules, None, hparams, dict(run_opts))
        self.recognizer = recognizer
        #: Where the search finds what decodes.
        self.searcher = recognizer.searcher

    def print_trainable_parameters(self) -> None:
        """Nothing: none is trained."""

    def compute_forward(
        self, batch: Any, stage: sb.Stage
    ) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Log probabilities, texts and relative lengths of a batch."""
        batch = batch.to(self.device)
        wavs, lengths = batch.sig
        encoded, texts = self.recognizer.transcribe(wavs, lengths)
        references = [self.recognizer.reference(text) for text in batch.wrd]
        scores = self.recognizer.log_probabilities(encoded, lengths, references)
        return scores, texts, lengths

    def compute_objectives(
        self, predictions: tuple, batch: Any, stage: sb.Stage
    ) -> torch.Tensor:
        """Count the errors of a batch; return its loss."""
        scores, texts, lengths = predictions
        references = [self.recognizer.reference(text) for text in batch.wrd]
        words = [text.split() for text in texts]
        targets = [text.split() for text in references]
        self.wer_metric.append(batch.id, words, targets)
        self.cer_metric.append(batch.id, words, targets)
        return self.recognizer.loss(scores, lengths, references)

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Begin new statistics."""
        self.wer_metric = ErrorRateStats()
        self.cer_metric = ErrorRateStats(split_tokens=True)
