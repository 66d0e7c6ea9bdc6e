"""What a folder would transcribe, beside what a recipe does."""

from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from speechbrain.dataio.encoder import CTCTextEncoder
from torch import nn

from speechbrain_stablequant.brain.checks import check_references
from speechbrain_stablequant.brain.decoding import (
    FolderDecoder,
    as_scored,
    describe_tokenizer,
    difference,
    find_tokenizer,
    same_text,
    with_spaces,
    writes_underscores,
)
from speechbrain_stablequant.brain.metrics import Row


def label_encoder(labels: str) -> CTCTextEncoder:
    """Labels behind the blank."""
    encoder = CTCTextEncoder()
    encoder.insert_blank(index=0)
    encoder.update_from_iterable(labels, sequence_input=False)
    encoder.expect_len(len(labels) + 1)
    return encoder


def pieces(tmp_path, **options) -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece model of capitals."""
    corpus = tmp_path / "text.txt"
    corpus.write_text("AB CD EF GH IJ\n" * 20, encoding="utf-8")
    settings = {
        "vocab_size": 14,
        "model_type": "char",
        "hard_vocab_limit": False,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "pieces"),
        minloglevel=2,
        **settings,
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(str(tmp_path / "pieces.model"))
    return processor


def words(*texts: str) -> list[Row]:
    """Utterances whose references are pairs of texts, split at spaces."""
    return [
        Row(f"u{i}", tuple(said.split()), tuple(heard.split()))
        for i, (said, heard) in enumerate(
            zip(texts[::2], texts[1::2], strict=True)
        )
    ]


# -- the folder's transcripts --------------------------------------------------


def outputs_of(indices: list[list[int]], labels: int) -> torch.Tensor:
    """Scores whose largest are at these labels."""
    one_hot = nn.functional.one_hot(torch.tensor(indices), labels)
    return one_hot.float().log_softmax(-1)


def test_greedy_as_encoder_asr():
    encoder = label_encoder("AB ")
    decoder = FolderDecoder(nn.Identity(), encoder, 0, "sig")
    outputs = outputs_of([[1, 1, 0, 1, 3, 2], [2, 2, 3, 3, 1, 1]], 4)
    texts = decoder.texts(outputs, torch.tensor([1.0, 0.67]))
    # The last two frames of the second one are padding.
    assert texts == [("A", "A", " ", "B"), ("B", " ")]
    # Outputs without a label are nothing, where SpeechBrain has an error.
    assert decoder.texts(outputs_of([[4, 1]], 5), torch.ones(1)) == [("", "A")]


def test_pieces(tmp_path):
    processor = pieces(tmp_path)
    decoder = FolderDecoder(nn.Identity(), processor, 0, "sig")
    ids = processor.encode("AB CD")
    (text,) = decoder.texts(outputs_of([ids], 20), torch.ones(1))
    assert text == ("AB CD",)


class Brain:
    """Computes by two modules, the last one as often as it is told."""

    def __init__(self, times: int = 1):
        self.last, self.times = nn.Identity(), times

    def compute_forward(self, batch, stage):
        """Scores that stand in the batch."""
        for _ in range(self.times):
            output = self.last(batch.scores)
        return output


def batch_of(indices: list[list[int]]):
    lengths = torch.ones(len(indices))
    return SimpleNamespace(
        sig=(torch.zeros(len(indices), 4), lengths),
        scores=outputs_of(indices, 4),
    )


def test_listening_to_a_brain():
    brain = Brain()
    decoder = FolderDecoder(brain.last, label_encoder("AB "), 0, "sig")
    with decoder.listening(brain) as texts:
        brain.compute_forward(batch_of([[1, 2], [2, 0]]), "stage")
        brain.compute_forward(batch_of([[3, 3]]), stage="stage")
    assert texts == [("A", "B"), ("B",), (" ",)]
    brain.compute_forward(batch_of([[1, 2]]), "stage")
    assert len(texts) == 3
    assert not brain.last._forward_hooks
    assert "compute_forward" not in vars(brain)


@pytest.mark.parametrize("times", [2, 3])
def test_a_last_module_that_is_called_again_says_nothing(times):
    brain = Brain(times)
    decoder = FolderDecoder(brain.last, label_encoder("AB "), 0, "sig")
    with decoder.listening(brain) as texts:
        brain.compute_forward(batch_of([[1, 2]]), "stage")
    assert texts == []


def test_the_hook_goes_when_the_recipe_fails():
    brain = Brain()
    decoder = FolderDecoder(brain.last, label_encoder("AB "), 0, "sig")
    with pytest.raises(AttributeError), decoder.listening(brain):
        brain.compute_forward(None, "stage")
    assert not brain.last._forward_hooks
    assert "compute_forward" not in vars(brain)


# -- the same or not -----------------------------------------------------------


@pytest.mark.parametrize(
    "hypothesis",
    [
        ("AB", "A"),  # words
        ("A", "B", " ", "A"),  # labels
        ("A", "B", "_", "A"),  # characters of SpeechBrain's metric
        ("AB A",),
    ],
)
def test_tokens_of_the_same_text(hypothesis):
    texts = [("A", "B", " ", "A", " ")]
    assert same_text([Row("u", (), hypothesis)], texts)
    assert not same_text([Row("u", (), hypothesis)], [("A", "A")])
    assert not same_text([Row("u", (), hypothesis)], [])
    # All utterances are read the same way.
    two = [Row("u", (), hypothesis), Row("v", (), ("A", "B"))]
    assert not same_text(two, [*texts, ("A", "B", " ", "B")])


def test_difference_names_the_first_utterance():
    rows = words("A", "A", "B A", "B")
    assert difference(rows, [("A",), ("B",)]) is None
    text, said = difference(rows, [("A",), ("B", " ", "A")])
    assert said == "utterance u1 is 'B' in the recipe and 'B A' in the folder"
    assert "u1" not in text


def test_the_folder_in_the_tokens_that_are_scored():
    text = [("A", "B", " ", "A", " ")]
    assert as_scored(words("AB A", "AB"), text) == ["AB A"]
    one = [Row("u", ("A", "_", "B"), ())]
    assert as_scored(one, text) == ["A B _ A"]
    assert as_scored([Row("u", ("A", "B"), ())], text) == ["A B   A"]


# -- spaces --------------------------------------------------------------------


def test_underscores_are_spaces():
    encoder = label_encoder("AB_")
    assert writes_underscores(encoder, words("AB A", "A"))
    assert writes_underscores(encoder, [Row("u", ("A", "_", "B"), ())])


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ("AB _", words("AB A", "A")),  # there is a space
        ("AB", words("AB A", "A")),  # no such label
        ("AB_", words("A_B A", "A")),  # part of a word
        ("AB_", words("A B", "A_B")),
        ("AB_", words("AB", "AB")),  # no sign of a space
        ("AB_", []),
    ],
)
def test_underscores_that_are_not(labels, rows):
    assert not writes_underscores(label_encoder(labels), rows)


def test_pieces_have_spaces(tmp_path):
    assert not writes_underscores(pieces(tmp_path), words("AB A", "A"))


def test_respelled_for_good():
    encoder = label_encoder("AB_")
    decoder = FolderDecoder(nn.Identity(), encoder, 0, "sig")
    text = [("A", "_", "B")]
    assert decoder.respelled(words("AB", "AB"), text) == text
    assert decoder.respelled(words("A B", "A B"), text) == [("A", " ", "B")]
    assert decoder.respelled(words("AB", "AB"), text) == [("A", " ", "B")]
    outputs = outputs_of([[1, 3, 2]], 4)
    assert decoder.texts(outputs, torch.ones(1)) == [("A", " ", "B")]
    # The recipe's own is as it was.
    assert encoder.decode_ndim([1, 3, 2]) == ["A", "_", "B"]


def test_the_file_of_a_respelled_encoder(tmp_path):
    content = describe_tokenizer(with_spaces(label_encoder("AB_"))).content
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    loaded = CTCTextEncoder()
    loaded.load(str(path))
    assert loaded.decode_ndim([1, 2, 3]) == ["A", "B", " "]
    assert loaded.get_blank_index() == 0


# -- what labels can write -----------------------------------------------------


def uncovered(rows, tokenizer):
    """The warning about words that labels cannot write."""
    return check_references(rows, tokenizer, "dev", 100.0)


def test_transcripts_in_another_case():
    rows = words("ab c", "AB", "C a", "C")
    text, said = uncovered(rows, label_encoder("ABC "))
    assert text.startswith("Of the words of dev 3 of 4 cannot be recognized: ")
    assert "u0" not in text
    assert "utterance u0 has 'abc', which no label" in said


def test_covered_transcripts():
    encoder = label_encoder("AB_")
    assert uncovered(words("AB A", "A"), encoder) is None
    labels = [Row("u", ("A", "_", "B"), ("A",))]
    assert uncovered(labels, encoder) is None


def test_what_a_special_label_is_written_with_covers_nothing():
    encoder = label_encoder("AB ")
    encoder.add_unk()
    assert encoder.blank_label == "<blank>"
    assert "has '<>ab'" in uncovered(words("<ab> A", "A"), encoder).example


def test_a_recipe_that_changes_what_it_decodes():
    """Its labels say nothing about its transcripts."""
    assert uncovered(words("ab", "ab"), label_encoder("AB ")) is None


def test_nothing_recognized_says_nothing():
    assert uncovered(words("ab", ""), label_encoder("AB ")) is None


def test_coverage_of_pieces(tmp_path):
    processor = pieces(tmp_path)
    assert uncovered(words("AB IJ", "AB"), processor) is None
    text, said = uncovered(words("AB xJ", "AB"), processor)
    assert "1 of 2 cannot be recognized" in text
    assert "utterance u0 has 'x'" in said
    spelled = pieces(
        tmp_path, byte_fallback=True, vocab_size=300, model_type="unigram"
    )
    assert uncovered(words("AB xJ", "AB"), spelled) is None


# -- the tokenizer -------------------------------------------------------------


def test_where_a_tokenizer_is_found(tmp_path):
    encoder, other = label_encoder("AB"), label_encoder("CD")
    hparams = SimpleNamespace(anything=other, label_encoder=encoder)
    assert find_tokenizer(SimpleNamespace(hparams=hparams)) is encoder
    brain = SimpleNamespace(hparams=SimpleNamespace(), own=other)
    assert find_tokenizer(brain) is other
    processor = pieces(tmp_path)
    brain = SimpleNamespace(
        hparams=SimpleNamespace(tokenizer=SimpleNamespace(sp=processor))
    )
    assert find_tokenizer(brain) is processor
    assert find_tokenizer(SimpleNamespace(hparams=SimpleNamespace())) is None
