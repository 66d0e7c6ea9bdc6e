"""The recipe without mention, decoding or transcribed otherwise.

> VARIATION=underscore python decoding_recipe.py hparams.yaml ARGUMENTS
"""

import os
import sys
from pathlib import Path

import speechbrain as sb
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.utils.metric_stats import ErrorRateStats


def underscore(train):
    """As in MEDIA's recipe: the label of a space is ``_``, and the metric
    makes words of labels."""

    class Recognizer(train.Recognizer):
        def on_evaluate_start(self, max_key=None, min_key=None):
            super().on_evaluate_start(max_key, min_key)
            encoder = self.tokenizer
            if " " in encoder.lab2ind:
                encoder.lab2ind["_"] = index = encoder.lab2ind.pop(" ")
                encoder.ind2lab[index] = "_"
                plain = encoder.encode_sequence
                encoder.encode_sequence = lambda labels: plain(
                    ["_" if label == " " else label for label in labels]
                )

        def on_stage_start(self, stage, epoch):
            super().on_stage_start(stage, epoch)
            if stage != sb.Stage.TRAIN:
                self.wer_metric = ErrorRateStats(merge_tokens=True)
                self.cer_metric = self.wer_metric

        def compute_forward(self, batch, stage):
            scores, lengths, _ = super().compute_forward(batch, sb.Stage.TRAIN)
            return scores, lengths, None

        def compute_objectives(self, predictions, batch, stage):
            scores, lengths, _ = predictions
            tokens, token_lengths = batch.tokens
            self.wer_metric.append(
                batch.id,
                ctc_greedy_decode(scores, lengths, blank_id=0),
                tokens,
                target_len=token_lengths,
                ind2lab=self.tokenizer.decode_ndim,
            )
            return self.hparams.ctc_cost(scores, tokens, lengths, token_lengths)

    train.Recognizer = Recognizer


def _change_texts(train, change):
    """Lets a function change what is recognized and what was said."""
    plain = train.Recognizer.compute_objectives

    def compute_objectives(self, predictions, batch, stage):
        scores, lengths, texts = predictions
        if stage != sb.Stage.TRAIN:
            texts, batch.wrd = change(texts, batch.wrd)
        return plain(self, (scores, lengths, texts), batch, stage)

    train.Recognizer.compute_objectives = compute_objectives


def shortened(train):
    """A decoder that loses the last letter."""
    _change_texts(train, lambda heard, said: ([t[:-1] for t in heard], said))


def capitals(train):
    """Transcripts in capitals, which no label is."""
    _change_texts(train, lambda heard, said: (heard, [t.upper() for t in said]))


def silence(train):
    """One utterance in which nothing is said."""

    def change(heard, said):
        return heard, ["" if t == said_first[0] else t for t in said]

    said_first = []

    def remember(heard, said):
        said_first[:] = said_first or said[:1]
        return change(heard, said)

    _change_texts(train, remember)


def nothing(train):
    """No utterance in which anything is said."""
    _change_texts(train, lambda heard, said: (heard, [""] * len(said)))


def relu(train):
    """ReLU for GELU in the modules, the configuration unchanged."""
    from torch import nn

    plain = train.Recognizer.on_evaluate_start

    def on_evaluate_start(self, max_key=None, min_key=None):
        plain(self, max_key, min_key)
        for block in self.modules.wav2vec2.model.encoder.layers:
            block.feed_forward.intermediate_act_fn = nn.ReLU()

    train.Recognizer.on_evaluate_start = on_evaluate_start


def hooked(train):
    """A norm whose output a hook changes: no setting says so."""
    plain = train.Recognizer.on_evaluate_start

    def on_evaluate_start(self, max_key=None, min_key=None):
        plain(self, max_key, min_key)
        norm = self.modules.wav2vec2.model.encoder.layer_norm
        norm.register_forward_hook(lambda _module, _args, out: out.relu())

    train.Recognizer.on_evaluate_start = on_evaluate_start


VARIATIONS = {
    function.__name__: function
    for function in (
        underscore,
        shortened,
        capitals,
        silence,
        nothing,
        relu,
        hooked,
    )
}

if __name__ == "__main__":
    recipe = Path(__file__).resolve().parent / "recipe_without_mention"
    sys.path.insert(0, str(recipe))
    import train

    for name in os.environ["VARIATION"].split(","):
        VARIATIONS[name](train)
    train.run(*train.prepare(sys.argv[1:]))
