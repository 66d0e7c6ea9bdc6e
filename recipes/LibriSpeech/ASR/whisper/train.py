#!/usr/bin/env python3
"""Recipe for evaluating or fine-tuning a Whisper recognizer on LibriSpeech, or
on a corpus with its layout.

Encoder and decoder are a HuggingFace checkpoint in SpeechBrain's wrapper, which
can be evaluated without any training. Decoding is greedy; `test_beam_size`
above 1 has the test sets decoded by a beam search.

To run this recipe, do the following:
> python train.py hparams/quant_whisper.yaml --data_folder LIBRISPEECH

Authors
 * The speechbrain_stablequant developers 2026
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from speechbrain_stablequant.utils.versions import import_torchaudio

try:
    import_torchaudio()
except ImportError as error:
    sys.exit(str(error))

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import if_main_process, run_on_main


class ASR(sb.Brain):
    """A Whisper encoder and decoder."""

    def compute_forward(self, batch, stage):
        """Computes the log probabilities of the reference's tokens.

        Arguments
        ---------
        batch : PaddedBatch
            Has `sig` and `tokens_bos`.
        stage : sb.Stage
            TRAIN, VALID or TEST.

        Returns
        -------
        log_probs : torch.Tensor
            Log probabilities of each next token, [batch, tokens, vocabulary].
        hyps : list
            Decoded tokens (VALID, TEST) or None.
        """
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        tokens, token_lens = batch.tokens_bos

        # The decoder expects its own padding.
        real = torch.round(token_lens * tokens.shape[1]).long()
        places = torch.arange(tokens.shape[1], device=self.device)
        padding = places[None] >= real[:, None]
        tokens = tokens.masked_fill(padding, self.tokenizer.pad_token_id)

        encoded, logits, _ = self.modules.whisper(wavs, tokens)
        log_probs = logits.float().log_softmax(dim=-1)

        hyps = None
        if stage == sb.Stage.TEST and self.hparams.test_beam_size > 1:
            hyps, *_ = self.hparams.test_search(encoded.detach(), wav_lens)
        elif stage != sb.Stage.TRAIN:
            hyps, *_ = self.hparams.valid_search(encoded.detach(), wav_lens)
        return log_probs, hyps

    def compute_objectives(self, predictions, batch, stage):
        """Computes the negative log likelihood and collects the errors.

        Arguments
        ---------
        predictions : tuple
            What `compute_forward` returned.
        batch : PaddedBatch
            Has `id`, `text` and `tokens_eos`.
        stage : sb.Stage
            TRAIN, VALID or TEST.

        Returns
        -------
        torch.Tensor
            The loss.
        """
        log_probs, hyps = predictions
        tokens, token_lens = batch.to(self.device).tokens_eos
        loss = sb.nnet.losses.nll_loss(log_probs, tokens, length=token_lens)
        if stage != sb.Stage.TRAIN:
            texts = self.tokenizer.batch_decode(hyps, skip_special_tokens=True)
            words = [self.normalize(text).split() for text in texts]
            targets = [text.split() for text in batch.text]
            self.wer_metric.append(batch.id, words, targets)
            self.cer_metric.append(batch.id, words, targets)
        return loss

    def on_stage_start(self, stage, epoch=None):
        """Makes new metrics.

        Arguments
        ---------
        stage : sb.Stage
            TRAIN, VALID or TEST.
        epoch : int
            The epoch; None for TEST.
        """
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.error_rate_computer()
            self.cer_metric = self.hparams.cer_computer()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Logs the stage; saves the checkpoint (VALID) or the errors (TEST).

        Arguments
        ---------
        stage : sb.Stage
            TRAIN, VALID or TEST.
        stage_loss : float
            The mean loss.
        epoch : int
            The epoch; None for TEST.
        """
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            return
        stats["CER"] = self.cer_metric.summarize("error_rate")
        stats["WER"] = self.wer_metric.summarize("error_rate")
        if stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(
                    meta={"WER": stats["WER"]}, min_keys=["WER"]
                )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={"Epoch loaded": self.hparams.epoch_counter.current},
            test_stats=stats,
        )
        if if_main_process():
            path = self.hparams.test_wer_file
            with open(path, "w", encoding="utf-8") as out:
                self.wer_metric.write_stats(out)


def english_normalizer(tokenizer) -> Callable[[str], str]:
    """Gives Whisper's normalizer of English text, which knows as many British
    spellings as the checkpoint's `normalizer.json` lists.

    Arguments
    ---------
    tokenizer : WhisperTokenizer
        The checkpoint's tokenizer.

    Returns
    -------
    callable
        Text -> normalized text.
    """
    from transformers.models.whisper.english_normalizer import (
        EnglishTextNormalizer,
    )

    return EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {})


def load_split(
    hparams: dict, name: str
) -> sb.dataio.dataset.DynamicItemDataset:
    """Reads a split's CSV, sorted by duration, then by ID.

    Arguments
    ---------
    hparams : dict
        The YAML file's values.
    name : str
        The split, or "train" for the merged training splits.

    Returns
    -------
    DynamicItemDataset
        The utterances.
    """
    data = sb.dataio.dataset.DynamicItemDataset.from_csv(
        csv_path=os.path.join(hparams["output_folder"], f"{name}.csv"),
        replacements={"data_root": hparams["data_folder"]},
    )
    # The CSV is sorted by ID and this sort is stable.
    return data.filtered_sorted(sort_key="duration")


def dataio_prepare(
    hparams: dict, tokenizer, normalize: Callable[[str], str]
) -> tuple:
    """Prepares the data sets.

    Arguments
    ---------
    hparams : dict
        The YAML file's values.
    tokenizer : WhisperTokenizer
        The checkpoint's tokenizer.
    normalize : callable
        Text -> normalized text.

    Returns
    -------
    train_data : DynamicItemDataset
        Empty if there are no training splits.
    valid_data : DynamicItemDataset
        The development split.
    test_datasets : dict
        Split name -> DynamicItemDataset.
    """
    names = list(hparams["dev_splits"]) + list(hparams["test_splits"])
    if len(hparams["dev_splits"]) != 1:
        raise ValueError(
            f"dev_splits: {hparams['dev_splits']} has not exactly one split:"
            ' write e.g. ["dev-clean"]'
        )
    splits = {name: load_split(hparams, name) for name in dict.fromkeys(names)}
    valid_data = splits[hparams["dev_splits"][0]]
    test_datasets = {name: splits[name] for name in hparams["test_splits"]}
    if hparams["train_splits"]:
        train_data = load_split(hparams, "train")
    else:
        train_data = valid_data.filtered_sorted(select_n=0)
    datasets = [train_data, *splits.values()]

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    sb.dataio.dataset.add_dynamic_item(datasets, audio_pipeline)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("text", "tokens_bos", "tokens_eos")
    def text_pipeline(wrd):
        text = normalize(wrd)
        yield text
        tokens = tokenizer.build_inputs_with_special_tokens(
            tokenizer.encode(text, add_special_tokens=False)
        )
        yield torch.LongTensor(tokens[:-1])
        yield torch.LongTensor(tokens[1:])

    sb.dataio.dataset.add_dynamic_item(datasets, text_pipeline)
    sb.dataio.dataset.set_output_keys(
        datasets, ["id", "sig", "text", "tokens_bos", "tokens_eos"]
    )
    return train_data, valid_data, test_datasets


def prepare(arguments: list) -> tuple:
    """Makes the recognizer and its data sets.

    Arguments
    ---------
    arguments : list of str
        The command line: a YAML file and options.

    Returns
    -------
    asr_brain : ASR
        The recognizer.
    train_data : DynamicItemDataset
        Empty if there are no training splits.
    valid_data : DynamicItemDataset
        The development split.
    test_datasets : dict
        Split name -> DynamicItemDataset.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    sb.utils.distributed.ddp_init_group(run_opts)

    try:
        with open(hparams_file, encoding="utf-8") as fin:
            hparams = load_hyperpyyaml(fin, overrides)
    except OSError as error:
        reason = error.strerror
        if error.filename != hparams_file:
            reason = (
                "check whisper_hub, a local folder or a HuggingFace Hub id: "
                f"{str(error).splitlines()[0]}"
            )
        sys.exit(f"{hparams_file}: {reason}")

    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )

    from librispeech_prepare import prepare_librispeech

    run_on_main(
        prepare_librispeech,
        kwargs={
            "data_folder": hparams["data_folder"],
            "tr_splits": hparams["train_splits"],
            "dev_splits": hparams["dev_splits"],
            "te_splits": hparams["test_splits"],
            "save_folder": hparams["output_folder"],
            "merge_lst": hparams["train_splits"],
            "merge_name": "train.csv",
            "skip_prep": hparams["skip_prep"],
        },
    )
    # float32 whatever the checkpoint stores.
    hparams["whisper"].float()
    tokenizer = hparams["whisper"].tokenizer
    normalize = str.lower
    if hparams["normalized_transcripts"]:
        normalize = english_normalizer(tokenizer)
    datasets = dataio_prepare(hparams, tokenizer, normalize)

    asr_brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams.get("opt_class"),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams.get("checkpointer"),
    )
    asr_brain.tokenizer = tokenizer
    asr_brain.normalize = normalize
    return asr_brain, *datasets


def run(
    asr_brain: ASR,
    train_data: sb.dataio.dataset.DynamicItemDataset,
    valid_data: sb.dataio.dataset.DynamicItemDataset,
    test_datasets: dict,
) -> None:
    """Trains the recognizer, then evaluates each test set.

    Arguments
    ---------
    asr_brain : ASR
        The recognizer.
    train_data : DynamicItemDataset
        Empty if there are no training splits.
    valid_data : DynamicItemDataset
        The development split.
    test_datasets : dict
        Split name -> DynamicItemDataset.
    """
    hparams = vars(asr_brain.hparams)
    options = dict(hparams["train_dataloader_opts"])
    asr_brain.fit(
        asr_brain.hparams.epoch_counter,
        train_data,
        valid_data,
        train_loader_kwargs=options if len(train_data) else {"batch_size": 1},
        valid_loader_kwargs=dict(hparams["valid_dataloader_opts"]),
    )

    for name, data in test_datasets.items():
        asr_brain.hparams.test_wer_file = str(
            Path(hparams["output_folder"]) / f"wer_{name}.txt"
        )
        # The loader's options are changed by their user: pass a copy.
        asr_brain.evaluate(
            data,
            test_loader_kwargs=dict(hparams["test_dataloader_opts"]),
            min_key="WER",
        )


if __name__ == "__main__":
    run(*prepare(sys.argv[1:]))
