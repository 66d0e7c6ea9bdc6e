#!/usr/bin/env python3
"""A small CTC recipe: a wav2vec 2.0 encoder, a DNN and a character head.

> python train.py hparams.yaml --data_folder CORPUS --wav2vec2_hub MODEL
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    add_dynamic_item,
    set_output_keys,
)
from speechbrain.decoders import ctc_greedy_decode
from speechbrain.decoders.ctc import CTCBeamSearcher
from speechbrain.nnet.schedulers import update_learning_rate
from speechbrain.utils.data_pipeline import provides, takes


class Recognizer(sb.Brain):
    """Greedy decoding while validating, a beam search while testing."""

    def compute_forward(self, batch, stage):
        """Log probabilities, relative lengths and what was decoded."""
        batch = batch.to(self.device)
        signals, lengths = batch.sig
        hidden = self.modules.enc(self.modules.wav2vec2(signals, lengths))
        scores = self.hparams.log_softmax(self.modules.ctc_lin(hidden))
        if stage == sb.Stage.TRAIN:
            return scores, lengths, None
        if stage == sb.Stage.VALID:
            found = self.tokenizer.decode_ndim(
                ctc_greedy_decode(
                    scores, lengths, blank_id=self.hparams.blank_index
                )
            )
            return scores, lengths, ["".join(labels) for labels in found]
        beams = self.searcher(scores, lengths)
        return scores, lengths, [beam[0].text for beam in beams]

    def compute_objectives(self, predictions, batch, stage):
        """The CTC loss; counts the errors."""
        scores, lengths, texts = predictions
        tokens, token_lengths = batch.tokens
        if stage != sb.Stage.TRAIN:
            hypotheses = [text.split(" ") for text in texts]
            references = [text.split(" ") for text in batch.wrd]
            self.wer_metric.append(batch.id, hypotheses, references)
            self.cer_metric.append(batch.id, hypotheses, references)
        return self.hparams.ctc_cost(scores, tokens, lengths, token_lengths)

    def on_stage_start(self, stage, epoch):
        """New statistics."""
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.wer_computer()
            self.cer_metric = self.hparams.cer_computer()

    def on_stage_end(self, stage, stage_loss, epoch):
        """Anneals, logs, and saves the checkpoint or the errors."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        stats = {
            "loss": stage_loss,
            "WER": self.wer_metric.summarize("error_rate"),
            "CER": self.cer_metric.summarize("error_rate"),
        }
        logger = self.hparams.train_logger
        if stage == sb.Stage.TEST:
            logger.log_stats(
                {"epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )
            with open(self.hparams.test_wer_file, "w", encoding="utf-8") as out:
                self.wer_metric.write_stats(out)
            return
        rates = {}
        for name, optimizer in self.optimizers_dict.items():
            scheduler = getattr(self.hparams, f"{name}_annealing")
            rates[f"lr of {name}"], new = scheduler(stats["loss"])
            update_learning_rate(optimizer, new)
        logger.log_stats(
            {"epoch": epoch, **rates}, {"loss": self.train_loss}, stats
        )
        self.checkpointer.save_and_keep_only(
            meta={"WER": stats["WER"]}, min_keys=["WER"]
        )

    def init_optimizers(self):
        """One optimizer for the encoder and one for what follows it."""
        hparams = self.hparams
        self.optimizers_dict = {
            "wav2vec": hparams.wav2vec_opt(self.modules.wav2vec2.parameters()),
            "model": hparams.model_opt(hparams.model.parameters()),
        }
        for name, optimizer in self.optimizers_dict.items():
            self.checkpointer.add_recoverable(f"{name}_opt", optimizer)


def read_sets(hparams):
    """The data sets by name, and the label encoder of the training set."""
    folder = hparams["data_folder"]
    sets = {
        name: DynamicItemDataset.from_csv(
            Path(folder) / f"{name}.csv", replacements={"data_root": folder}
        ).filtered_sorted(sort_key="duration")
        for name in ("train", "valid", *hparams["test_sets"])
    }
    encoder = hparams["label_encoder"]

    @takes("wav")
    @provides("sig")
    def audio(wav):
        return read_audio(wav)

    @takes("wrd")
    @provides("wrd", "char_list", "tokens")
    def text(wrd):
        yield wrd
        chars = list(wrd)
        yield chars
        yield torch.LongTensor(encoder.encode_sequence(chars))

    add_dynamic_item(list(sets.values()), audio)
    add_dynamic_item(list(sets.values()), text)
    encoder.load_or_create(
        path=str(Path(hparams["save_folder"]) / "label_encoder.txt"),
        from_didatasets=[sets["train"]],
        output_key="char_list",
        special_labels={"blank_label": hparams["blank_index"]},
        sequence_input=True,
    )
    set_output_keys(list(sets.values()), ["id", "sig", "wrd", "tokens"])
    return sets, encoder


def prepare(arguments):
    """Makes the Brain and the data sets that a command line asks for."""
    file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(file, encoding="utf-8") as stream:
        hparams = load_hyperpyyaml(stream, overrides)
    sb.create_experiment_directory(
        hparams["output_folder"],
        hyperparams_to_save=file,
        overrides=overrides,
        save_env_desc=False,
    )
    Path(hparams["save_folder"]).mkdir(exist_ok=True)
    sets, encoder = read_sets(hparams)
    brain = Recognizer(
        modules=hparams["modules"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.tokenizer = encoder
    labels = [encoder.ind2lab[index] for index in range(len(encoder))]
    brain.searcher = CTCBeamSearcher(**hparams["beam"], vocab_list=labels)
    return brain, sets, hparams


def run(brain, sets, hparams):
    """Trains, then evaluates each test set."""
    brain.fit(
        brain.hparams.epoch_counter,
        sets["train"],
        sets["valid"],
        train_loader_kwargs=hparams["train_loader"],
        valid_loader_kwargs=hparams["valid_loader"],
    )
    for name in hparams["test_sets"]:
        brain.hparams.test_wer_file = str(
            Path(hparams["output_folder"]) / f"wer_{name}.txt"
        )
        brain.evaluate(
            sets[name],
            test_loader_kwargs=hparams["test_loader"],
            min_key="WER",
        )


if __name__ == "__main__":
    run(*prepare(sys.argv[1:]))
