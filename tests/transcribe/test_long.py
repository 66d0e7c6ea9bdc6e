"""Windows of long audio are joined without losing or doubling a word."""

import random
from types import SimpleNamespace

import pytest
import soundfile
import torch
from speechbrain.dataio.encoder import CTCTextEncoder

from speechbrain_stablequant.transcribe.long import words_of_file

RATE, STRIDE = 16000, 320
LABELS = ["", " ", *"ABCDEFGHIJ"]
#: Frames that the last window of samples does not fill.
LOST = 1


class Recognizer:
    """Reads the label of each frame from the audio, up to a frame too late in
    every second window."""

    def __init__(self, late: int):
        self.stride = STRIDE
        self.labels = LABELS
        self.tokenizer = CTCTextEncoder()
        self.spec = SimpleNamespace(sample_rate=RATE, blank_index=0)
        self.windows: list[int] = []
        self._late = late

    def load_audio(self, path, start=0, count=-1):
        wave, _ = soundfile.read(
            path, start=start, frames=count, dtype="float32"
        )
        return torch.from_numpy(wave)

    def encode_batch(self, wavs, lengths):
        assert torch.equal(lengths, torch.ones(len(wavs)))
        rows = []
        for wave in wavs:
            labels = (wave[::STRIDE] * 100).round().long()[:-LOST]
            if len(self.windows) % 2:
                blanks = torch.zeros(self._late, dtype=torch.long)
                labels = torch.cat([blanks, labels])[: len(labels)]
            self.windows.append(len(wave))
            rows.append(labels)
        return torch.nn.functional.one_hot(torch.stack(rows), len(LABELS))

    def text(self, tokens):
        return "".join(LABELS[i] for i in tokens)


def spoken(seconds: float, seed: int) -> tuple[list[int], list[str]]:
    """Labels of frames, and the words in them."""
    rng = random.Random(seed)
    labels: list[int] = [0] * 3
    words: list[str] = []
    while len(labels) < seconds * RATE / STRIDE - 40:
        word = "".join(rng.choices("ABCDEFGHIJ", k=rng.randint(1, 5)))
        words.append(word)
        for letter in word:
            labels += [LABELS.index(letter)] * rng.randint(1, 3)
            labels += [0] * rng.randint(1, 3)
        labels += [1] + [0] * rng.randint(0, 6)
    return labels + [0] * 8, words


def record(path, labels) -> None:
    wave = torch.tensor(labels, dtype=torch.float32).repeat_interleave(STRIDE)
    soundfile.write(path, (wave / 100).numpy(), RATE, subtype="FLOAT")


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("seconds, batch", [(3, 1), (16, 1), (61, 1), (95, 4)])
def test_no_word_is_lost_or_doubled(tmp_path, seconds, batch, late):
    for seed in range(5):
        labels, words = spoken(seconds, seed)
        record(tmp_path / "a.wav", labels)
        recognizer = Recognizer(late)
        found = list(
            words_of_file(recognizer, tmp_path / "a.wav", 16, 2, batch, False)
        )
        assert [word.text for word in found] == words
        assert max(recognizer.windows) <= 16 * RATE
        assert (len(recognizer.windows) > 1) == (len(labels) > 800)
        # Words follow one another and lie within the file.
        ends = [0.0, *(x for w in found for x in (w.start, w.end))]
        assert ends == sorted(ends)
        assert ends[-1] <= len(labels) * STRIDE / RATE


def test_times_of_words(tmp_path):
    labels = [0, 2, 2, 0, 3, 1, 0, 0, 4, 4]
    record(tmp_path / "a.wav", [*labels, 0, 0])
    found = words_of_file(Recognizer(0), tmp_path / "a.wav", 16, 2, 1, False)
    rows = [(word.text, word.start, word.end) for word in found]
    assert rows == [("AB", 0.02, 0.1), ("C", 0.16, 0.2)]


def test_words_come_while_the_file_is_read(tmp_path):
    labels, _ = spoken(100, 0)
    record(tmp_path / "a.wav", labels)
    recognizer = Recognizer(0)
    words = words_of_file(recognizer, tmp_path / "a.wav", 16, 2, 1, False)
    next(words)
    assert len(recognizer.windows) == 2


@pytest.mark.parametrize("window, overlap", [(4, 2), (16, 0), (2, 3)])
def test_windows_that_cannot_be_joined(tmp_path, window, overlap):
    record(tmp_path / "a.wav", [0] * 50)
    with pytest.raises(ValueError, match=f"window {window}, overlap {overlap}"):
        list(
            words_of_file(
                Recognizer(0), tmp_path / "a.wav", window, overlap, 1, False
            )
        )
