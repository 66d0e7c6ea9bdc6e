#!/usr/bin/env python3
"""Recipe for training and evaluating a wav2vec 2.0 or HuBERT CTC recognizer on
LibriSpeech, or on a corpus with its layout.

The encoder is a HuggingFace model in SpeechBrain's wrapper. With the key
`hf_ctc` the head and the character vocabulary are those of a HuggingFace CTC
checkpoint, which can then be evaluated without any training. Decoding is
greedy; the key `test_beam_search` has the test sets decoded by a beam search.

To run this recipe, do the following:
> python train.py hparams/quant.yaml

Authors
 * The speechbrain_stablequant developers 2026
"""

import os
import sys
from pathlib import Path

from speechbrain_stablequant.utils.versions import import_torchaudio

try:
    import_torchaudio()
except ImportError as error:
    sys.exit(str(error))

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.encoder import CTCTextEncoder
from speechbrain.utils.distributed import if_main_process, run_on_main
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


class ASR(sb.Brain):
    """A wav2vec 2.0 or HuBERT encoder with a CTC head over characters."""

    def compute_forward(self, batch, stage):
        """Computes the log probabilities of the characters.

        Arguments
        ---------
        batch : PaddedBatch
            Has `sig`.
        stage : sb.Stage
            TRAIN, VALID or TEST.

        Returns
        -------
        p_ctc : torch.Tensor
            Log probabilities, [batch, time, characters].
        wav_lens : torch.Tensor
            Relative lengths.
        hyps : list
            Decoded characters (VALID, TEST) or None.
        """
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig

        # Checkpoints with a group-norm front end were trained without a mask.
        extractor = getattr(self.hparams.wav2vec2, "feature_extractor", None)
        masked = getattr(extractor, "return_attention_mask", True)
        feats = self.modules.wav2vec2(wavs, wav_lens if masked else None)
        logits = self.modules.ctc_lin(self.modules.enc(feats))
        p_ctc = logits.float().log_softmax(dim=-1)

        hyps = None
        searcher = getattr(self, "test_searcher", None)
        if stage == sb.Stage.TEST and searcher is not None:
            hyps = [list(h[0].text) for h in searcher(p_ctc, wav_lens)]
        elif stage != sb.Stage.TRAIN:
            hyps = self.tokenizer.decode_ndim(
                sb.decoders.ctc_greedy_decode(
                    p_ctc, wav_lens, blank_id=self.hparams.blank_index
                )
            )
        return p_ctc, wav_lens, hyps

    def compute_objectives(self, predictions, batch, stage):
        """Computes the CTC loss and collects the errors.

        Arguments
        ---------
        predictions : tuple
            What `compute_forward` returned.
        batch : PaddedBatch
            Has `id`, `wrd` and `tokens`.
        stage : sb.Stage
            TRAIN, VALID or TEST.

        Returns
        -------
        torch.Tensor
            The loss.
        """
        p_ctc, wav_lens, hyps = predictions
        tokens, token_lens = batch.tokens
        loss = sb.nnet.losses.ctc_loss(
            p_ctc, tokens, wav_lens, token_lens, self.hparams.blank_index
        )
        if stage != sb.Stage.TRAIN:
            # Labels of more than one character are markers such as <s>.
            words = [
                "".join(c for c in hyp if len(c) == 1).split() for hyp in hyps
            ]
            targets = [wrd.split() for wrd in batch.wrd]
            self.wer_metric.append(batch.id, words, targets)
            self.cer_metric.append(batch.id, words, targets)
        return loss

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Sets the learning rate of the next step.

        Arguments
        ---------
        batch : PaddedBatch
            The batch.
        outputs : tuple
            What `compute_forward` returned.
        loss : torch.Tensor
            The loss.
        should_step : bool
            Whether the optimizer made a step.
        """
        if should_step and hasattr(self.hparams, "lr_annealing"):
            self.hparams.lr_annealing(self.optimizer, self.optimizer_step)

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
            meta = {"epoch": epoch, "steps": self.optimizer_step}
            if getattr(self, "optimizer", None) is not None:
                meta["lr"] = self.optimizer.param_groups[0]["lr"]
            self.hparams.train_logger.log_stats(
                stats_meta=meta,
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(
                    meta={"WER": stats["WER"]}, min_keys=["WER"]
                )
        else:
            self.hparams.train_logger.log_stats(
                stats_meta={"Epoch loaded": self.hparams.epoch_counter.current},
                test_stats=stats,
            )
            if if_main_process():
                with open(
                    self.hparams.test_wer_file, "w", encoding="utf-8"
                ) as out:
                    self.wer_metric.write_stats(out)


def checkpoint_encoder(source: str, path: str) -> CTCTextEncoder:
    """Makes the label encoder of a HuggingFace CTC checkpoint.

    The labels keep the checkpoint's order, the word delimiter becomes a space,
    and the padding token is the blank.

    Arguments
    ---------
    source : str
        Folder of the checkpoint, or its hub id.
    path : str
        File to save the encoder to.

    Returns
    -------
    CTCTextEncoder
        The encoder.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"wav2vec2_hub: the tokenizer of {source} has no pad token, which"
            " CTC uses as blank: choose a CTC checkpoint"
        )
    encoder = CTCTextEncoder()
    labels = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    for label, index in labels:
        if label == tokenizer.pad_token:
            encoder.insert_blank(label, index)
        elif label == tokenizer.unk_token:
            encoder.insert_label(label, index)
            encoder.unk_label = label
        elif label == tokenizer.word_delimiter_token:
            encoder.insert_label(" ", index)
        else:
            encoder.insert_label(label, index)
    encoder.expect_len(len(labels))
    if if_main_process():
        encoder.save(path)
    return encoder


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


def dataio_prepare(hparams: dict) -> tuple:
    """Prepares the data sets and the label encoder.

    Arguments
    ---------
    hparams : dict
        The YAML file's values.

    Returns
    -------
    train_data : DynamicItemDataset
        Empty if there are no training splits.
    valid_data : DynamicItemDataset
        The development split.
    test_datasets : dict
        Split name -> DynamicItemDataset.
    label_encoder : CTCTextEncoder
        Characters <-> indices.
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
        longest = hparams.get("avoid_if_longer_than", float("inf"))
        train_data = load_split(hparams, "train").filtered_sorted(
            key_max_value={"duration": longest}
        )
    else:
        train_data = valid_data.filtered_sorted(select_n=0)
    datasets = [train_data, *splits.values()]

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    sb.dataio.dataset.add_dynamic_item(datasets, audio_pipeline)

    lab_enc_file = os.path.join(hparams["save_folder"], "label_encoder.txt")
    os.makedirs(hparams["save_folder"], exist_ok=True)
    if "hf_ctc" in hparams:
        label_encoder = checkpoint_encoder(
            hparams["wav2vec2_hub"], lab_enc_file
        )
    else:
        label_encoder = CTCTextEncoder()

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides(
        "wrd", "char_list", "tokens_list", "tokens"
    )
    def text_pipeline(wrd):
        yield wrd
        char_list = list(wrd)
        yield char_list
        tokens_list = label_encoder.encode_sequence(char_list)
        yield tokens_list
        yield torch.LongTensor(tokens_list)

    sb.dataio.dataset.add_dynamic_item(datasets, text_pipeline)

    if "hf_ctc" not in hparams:
        label_encoder.load_or_create(
            path=lab_enc_file,
            from_didatasets=[train_data],
            output_key="char_list",
            special_labels={"blank_label": hparams["blank_index"]},
            sequence_input=True,
        )
    sb.dataio.dataset.set_output_keys(
        datasets, ["id", "sig", "wrd", "char_list", "tokens"]
    )
    return train_data, valid_data, test_datasets, label_encoder


def train_loader_options(
    hparams: dict, train_data: sb.dataio.dataset.DynamicItemDataset
) -> dict:
    """Gives the training loader's options, with batches of similar length if
    the key `dynamic_batch_sampler` asks for them.

    Arguments
    ---------
    hparams : dict
        The YAML file's values.
    train_data : DynamicItemDataset
        The training data.

    Returns
    -------
    dict
        Options of the data loader.
    """
    options = dict(hparams["train_dataloader_opts"])
    if len(train_data) == 0:
        # Nothing to shuffle; the epoch counter's limit is 0 in this case.
        return {"batch_size": 1}
    if hparams.get("dynamic_batch_sampler"):
        options.pop("batch_size", None)
        options.pop("shuffle", None)
        options["batch_sampler"] = sb.dataio.sampler.DynamicBatchSampler(
            train_data, **hparams["dynamic_batch_sampler"]
        )
    return options


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
                "check wav2vec2_hub, a local folder or a HuggingFace Hub id: "
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
    train_data, valid_data, test_datasets, label_encoder = dataio_prepare(
        hparams
    )
    if "hf_ctc" in hparams:
        hparams["blank_index"] = label_encoder.get_blank_index()
        # Only its head is used: the encoder's second copy can go.
        del hparams["hf_ctc"]

    if hparams.get("freeze_feature_extractor"):
        # The wrapper's own switch still backpropagates through it.
        hparams["wav2vec2"].model.freeze_feature_encoder()

    asr_brain = ASR(
        modules=hparams["modules"],
        opt_class=hparams.get("opt_class"),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams.get("checkpointer"),
    )
    asr_brain.tokenizer = label_encoder
    if hparams.get("test_beam_search"):
        from speechbrain.decoders.ctc import CTCBeamSearcher

        labels = [label_encoder.ind2lab[i] for i in range(len(label_encoder))]
        asr_brain.test_searcher = CTCBeamSearcher(
            **{
                "blank_index": hparams["blank_index"],
                "space_token": " ",
                **hparams["test_beam_search"],
            },
            vocab_list=labels,
        )
    return asr_brain, train_data, valid_data, test_datasets


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
    asr_brain.fit(
        asr_brain.hparams.epoch_counter,
        train_data,
        valid_data,
        train_loader_kwargs=train_loader_options(hparams, train_data),
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
