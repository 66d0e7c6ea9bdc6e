"""Tests of speechbrain_stablequant.brain.data."""

import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.utils.data import DataLoader, Subset

from speechbrain_stablequant.brain import audio
from speechbrain_stablequant.brain.audio import AudioError, check_audio
from speechbrain_stablequant.brain.data import (
    Batches,
    dataset_of,
    draw_subset,
    utterance_ids,
)

RATE = 16000
IDS = [f"utt{index:02}" for index in range(30)]


def dataset_in(order):
    return DynamicItemDataset({name: {"text": name} for name in order})


def shuffled(seed):
    return random.Random(seed).sample(IDS, len(IDS))


# -- drawing -------------------------------------------------------------------


def test_draw_does_not_depend_on_the_order():
    draws = {
        tuple(utterance_ids(draw_subset(dataset_in(order), 7, 99, 5, "search")))
        for order in (IDS, IDS[::-1], shuffled(1), shuffled(2))
    }
    (ids,) = draws
    assert len(set(ids)) == 7
    assert list(ids) == sorted(ids)
    assert set(ids) < set(IDS)


def test_draw_depends_on_the_seed():
    draws = [
        utterance_ids(draw_subset(dataset_in(IDS), 7, 99, seed, "search"))
        for seed in (0, 0, 1, 2)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]


def test_drawn_utterances_keep_their_content():
    data = DynamicItemDataset({name: {"text": name[::-1]} for name in IDS})
    data.set_output_keys(["id", "text"])
    drawn = draw_subset(data, 5, 99, 0, "search")
    assert len(drawn) == 5
    for index, name in enumerate(utterance_ids(drawn)):
        assert drawn[index] == {"id": name, "text": name[::-1]}


def test_draw_from_a_sorted_and_filtered_set():
    """As recipes hand it over: shortest first, without the long ones."""
    data = DynamicItemDataset(
        {name: {"length": -index} for index, name in enumerate(IDS)}
    )
    view = data.filtered_sorted(
        sort_key="length", key_max_value={"length": -10}
    )
    drawn = utterance_ids(draw_subset(view, 6, 99, 0, "search"))
    assert set(drawn) <= set(IDS[10:])
    assert drawn == sorted(drawn)
    plain = draw_subset(dataset_in(IDS[10:]), 6, 99, 0, "search")
    assert drawn == utterance_ids(plain)


def test_drawing_leaves_the_set_as_it_was():
    data = dataset_in(IDS)
    draw_subset(data, 3, 99, 0, "search")
    assert utterance_ids(data) == IDS


def test_draw_without_a_number():
    data = dataset_in(IDS)
    assert len(draw_subset(data, None, 8, 0, "search")) == 8
    assert utterance_ids(draw_subset(data, None, 99, 0, "search")) == IDS


def test_utterances_of_a_part_are_those_of_the_whole():
    assert utterance_ids(Subset(dataset_in(IDS), [3, 1])) == [IDS[3], IDS[1]]
    draws = [draw_subset(range(30), 3, 99, seed, "search") for seed in (0, 1)]
    assert utterance_ids(draws[0]) == [str(i) for i in draws[0].indices]
    # Sets of different utterances are told apart.
    assert utterance_ids(draws[0]) != utterance_ids(draws[1])


def test_draw_all():
    drawn = draw_subset(dataset_in(shuffled(0)), len(IDS), 1, 0, "search")
    assert utterance_ids(drawn) == IDS


def test_draw_from_a_plain_dataset():
    data = [torch.full((1,), float(index)) for index in range(20)]
    values = [[float(x) for x in draw_subset(data, 6, 9, 3, "search")]] * 2
    assert values[0] == values[1] == sorted(set(values[0]))
    assert len(values[0]) == 6


@pytest.mark.parametrize("key", ["calibration", "search"])
def test_too_many_asked(key):
    with pytest.raises(ValueError) as error:
        draw_subset(dataset_in(IDS), 31, 99, 0, key)
    assert str(error.value) == (
        f"quantize.{key}.num_utterances: 31 asked, but the validation set "
        "has 30; write 30 or less"
    )


@pytest.mark.parametrize("number", [None, 3])
def test_empty_set(number):
    nothing = dataset_in(IDS).filtered_sorted(select_n=0)
    for data in (nothing, []):
        with pytest.raises(ValueError) as error:
            draw_subset(data, number, 99, 0, "calibration")
        text = str(error.value)
        assert text.startswith("quantize.calibration: the validation set is ")
        assert "empty" in text
        assert "\n" not in text


def test_dataset_of():
    data = dataset_in(IDS)
    assert dataset_of(data) is data
    assert dataset_of(DataLoader(data)) is data
    assert dataset_of(make_dataloader(data)) is data


# -- audio files ---------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    """Writes noise, or the given samples, to an audio file."""

    def write(name, samples=4000, rate=RATE, channels=1, subtype=None):
        if not isinstance(samples, np.ndarray):
            shape = (samples, channels) if channels > 1 else samples
            generator = np.random.default_rng(0)
            samples = generator.normal(0, 0.1, shape)
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype)
        return str(path)

    return write


def plain(wav):
    """A pipeline that takes the file as it is."""
    return read_audio(wav)


def resampling(wav):
    """A pipeline for files of any rate."""
    rate = soundfile.info(wav).samplerate
    return torchaudio.functional.resample(read_audio(wav), rate, RATE)


def averaging(wav):
    """A pipeline for files of any number of channels."""
    wave = read_audio(wav)
    return wave if wave.dim() == 1 else wave.mean(1)


def audio_set(*paths, pipeline=plain):
    """One utterance for each file, with a recipe's audio pipeline."""
    data = DynamicItemDataset(
        {f"u{index}": {"wav": path} for index, path in enumerate(paths)}
    )
    data.add_dynamic_item(pipeline, takes="wav", provides="sig")
    data.set_output_keys(["id", "sig"])
    return data


def check(data, min_samples=400):
    check_audio(data, "wav", "sig", RATE, min_samples)


def audio_error(data, path, name="u1") -> str:
    """The error, without the utterance and the path that it begins with."""
    with pytest.raises(AudioError) as error:
        check(data)
    text = str(error.value)
    assert "\n" not in text
    start = f"utterance {name}: {path} "
    assert text.startswith(start)
    return text.removeprefix(start)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_good_audio(write, name):
    check(audio_set(write(name), write("float.wav", subtype="FLOAT")))


def test_missing_file(write, tmp_path):
    path = str(tmp_path / "nowhere.wav")
    text = audio_error(audio_set(write("a.wav"), path), path)
    assert text.startswith("is not there")


@pytest.mark.parametrize("content", [b"", b"not audio at all", b"RIFF1234WAVE"])
def test_no_audio_file(write, tmp_path, content):
    path = tmp_path / "text.wav"
    path.write_bytes(content)
    text = audio_error(audio_set(write("a.wav"), str(path)), path)
    assert text.startswith("cannot be read as audio")


def test_empty_file(write):
    path = write("empty.wav", 0)
    assert audio_error(audio_set(write("a.wav"), path), path) == (
        "is empty; remove the utterance"
    )


def test_too_short(write):
    path = write("short.wav", 399)
    assert audio_error(audio_set(write("a.wav"), path), path) == (
        "has 399 samples, fewer than the 400 of one frame; remove the utterance"
    )
    check(audio_set(write("just.wav", 400)))


@pytest.mark.parametrize("rate", [8000, 44100])
def test_another_rate(write, rate):
    path = write("rate.wav", rate=rate)
    text = audio_error(audio_set(write("a.wav"), path), path)
    assert text.startswith(f"is sampled at {rate} Hz and the recipe's pipeline")
    assert text.endswith(
        "does not resample it to 16000 Hz; resample it there, or, if the model "
        f"was trained at that rate, write quantize.sample_rate: {rate}"
    )


@pytest.mark.parametrize("rate", [8000, 44100])
def test_another_rate_that_is_resampled(write, rate):
    data = audio_set(
        write("a.wav"), write("rate.wav", rate=rate), pipeline=resampling
    )
    check(data)


DEMO = Path(__file__).resolve().parents[2] / (
    "recipes/LibriSpeech/ASR/CTC/demo/LibriSpeech/dev-demo/2001/20"
)


def long_file(write, rate, channels=1):
    """Speech at another rate, with a noise between its three parts."""
    parts = [
        torch.from_numpy(soundfile.read(path)[0])
        for path in sorted(DEMO.glob("*.flac"))[:3]
    ]
    wave = torchaudio.functional.resample(torch.cat(parts), RATE, rate).numpy()
    if channels > 1:
        wave = np.stack([wave, np.roll(wave, 4321)], 1)
    return write("long.wav", wave, rate)


def segments(path, *pipeline):
    """Three segments of a file, by columns of any name."""
    frames = soundfile.info(path).frames
    rows = {
        f"u{index}": {"wav": path, "from": place, "to": place + frames // 4}
        for index, place in enumerate((0, frames // 2, 3 * frames // 4))
    }
    rate = soundfile.info(path).samplerate

    def cut(path, start, stop):
        wave = read_audio({"file": path, "start": start, "stop": stop})
        for step in pipeline:
            wave = step(wave, rate)
        return wave

    data = DynamicItemDataset(rows)
    data.add_dynamic_item(cut, takes=["wav", "from", "to"], provides="sig")
    data.set_output_keys(["id", "sig"])
    return data


def to_model_rate(wave, rate):
    return torchaudio.functional.resample(wave, rate, RATE)


def trimmed(wave, rate):
    """Without what is before and behind the loud parts."""
    loud = (wave.abs() > 0.1 * wave.abs().max()).nonzero()
    return wave[loud.min() : loud.max()]


def normalized(wave, rate):
    return 0.3 * wave / wave.abs().max()


def mono(wave, rate):
    return wave if wave.dim() == 1 else wave.mean(1)


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_segments_that_are_resampled(write, rate):
    """Their durations are not those of their file."""
    path = long_file(write, rate)
    check(segments(path, to_model_rate))
    check(segments(path, trimmed, to_model_rate))
    check(segments(path, to_model_rate, trimmed, normalized))


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("steps", [(), (trimmed,), (normalized,)])
def test_segments_that_are_not_resampled(write, rate, steps):
    path = long_file(write, rate)
    text = audio_error(segments(path, *steps), path, name="u0")
    assert f"quantize.sample_rate: {rate}" in text


def test_channels_of_another_rate(write):
    path = long_file(write, 44100, channels=2)
    check(segments(path, mono, to_model_rate))
    text = audio_error(segments(path, mono), path, name="u0")
    assert "is sampled at 44100 Hz" in text


def test_silence_is_trimmed(write):
    path = long_file(write, RATE)
    data = audio_set(path, pipeline=lambda wav: trimmed(read_audio(wav), RATE))
    check(data)


def test_resampled_and_cut_to_as_many_samples_as_the_file_has(write):
    """A length alone proves nothing."""
    path = long_file(write, 8000)
    frames = soundfile.info(path).frames
    check(audio_set(path, pipeline=lambda wav: resampling(wav)[:frames]))


def test_silent_file_of_another_rate(write):
    check(audio_set(write("silent.wav", np.zeros(4000), rate=8000)))


def test_a_few_files_of_each_rate_are_compared(write, monkeypatch):
    """The pipeline is the same for all."""
    seen = []
    monkeypatch.setattr(
        audio, "is_stretch_of", lambda head, wave: seen.append(head.samplerate)
    )
    paths = [write(f"{i}.wav", rate=8000 // (1 + i % 2)) for i in range(20)]
    check(audio_set(*paths, pipeline=resampling))
    assert sorted(seen) == [4000] * 3 + [8000] * 3


def test_a_path_that_only_the_pipeline_knows(write, tmp_path):
    write("a.wav")

    def below(wav):
        return read_audio(str(tmp_path / wav))

    check(audio_set("a.wav", pipeline=below))
    text = audio_error(audio_set("a.wav", "b.wav", pipeline=below), "b.wav")
    assert text.startswith("is not there")


def test_a_format_that_only_the_pipeline_knows(tmp_path):
    path = tmp_path / "raw.pcm"
    noise = np.random.default_rng(0).normal(0, 3000, 4000)
    noise.astype("<i2").tofile(path)

    def raw(wav):
        return torch.from_numpy(np.fromfile(wav, "<i2").astype("f") / 32768)

    check(audio_set(str(path), pipeline=raw))
    short = audio_set(str(path), pipeline=lambda wav: raw(wav)[:7])
    assert audio_error(short, path, name="u0").startswith("has 7 samples")


def test_truncated_file(write):
    path = Path(write("cut.flac", 16000))
    path.write_bytes(path.read_bytes()[:9000])
    text = audio_error(audio_set(write("a.wav"), str(path)), path)
    assert text.startswith("cannot be read as audio")


def test_a_file_that_cannot_be_read_from_its_end(tmp_path):
    path = tmp_path / "telephone.au"
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(path, noise, 16000, subtype="G721_32")
    text = audio_error(audio_set(str(path)), path, name="u0")
    assert text.startswith("cannot be read as audio")


def test_text_is_not_made_to_check_audio(write):
    """A transcript may be what the tokenizer does not know."""
    data = audio_set(write("stereo.wav", channels=2), pipeline=averaging)

    def text(wav):
        raise KeyError("tokens")

    data.add_dynamic_item(text, takes="wav", provides="tokens")
    data.set_output_keys(["id", "sig", "tokens"])
    check(data)


def test_too_short_after_resampling(write):
    path = write("short.wav", 100, rate=8000)
    data = audio_set(write("a.wav"), path, pipeline=resampling)
    audio_error(data, path)


def test_stereo(write):
    path = write("stereo.wav", channels=2)
    text = audio_error(audio_set(write("a.wav"), path), path)
    assert text.startswith("has 2 channels")


def test_stereo_that_is_averaged(write):
    paths = write("a.wav"), write("stereo.wav", channels=2)
    check(audio_set(*paths, pipeline=averaging))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nan_in_a_float_file(write, bad, subtype):
    samples = np.zeros(4000)
    samples[1234] = bad
    path = write("nan.wav", samples, subtype=subtype)
    text = audio_error(audio_set(write("a.wav"), path), path)
    assert text == "holds NaN or Inf; remove the utterance"


def test_the_first_utterance_is_named_as_well(write):
    path = write("short.wav", 10)
    data = audio_set(path, write("a.wav"))
    assert audio_error(data, path, name="u0").startswith("has 10 samples")


def test_plain_files_are_not_decoded(write):
    """The header is enough: a large set is checked in no time."""

    def refuse(wav):
        raise AssertionError("decoded")

    check(audio_set(write("a.wav"), write("a.flac"), pipeline=refuse))


def test_sets_that_cannot_be_checked(write):
    check([torch.zeros(4)])
    data = DynamicItemDataset({"u0": {"array": 1}})
    check(data)


# -- batches -------------------------------------------------------------------

SAMPLES = (4000, 1000, 2500)


@pytest.fixture
def three(write):
    """Three utterances of different lengths."""
    return audio_set(*(write(f"{n}.wav", n) for n in SAMPLES))


def test_batches(three):
    batches = Batches(three, 2, {}, "sig")
    assert batches.ids == ["u0", "u1", "u2"]
    assert len(batches) == len(batches.load()) == 2
    assert [batch.id for batch in batches.load()] == [["u0", "u1"], ["u2"]]
    assert batches.lengths(0) == (4000, [4000, 1000])
    assert batches.lengths(1) == (2500, [2500])
    wavs, _ = batches.load()[0].sig
    assert torch.equal(wavs[1, :1000], three[1]["sig"])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_lengths_are_exact(write, size):
    """Relative lengths are float32, samples are whole."""
    samples = [16777, 16001, 9973, 401]
    data = audio_set(*(write(f"{n}.wav", n) for n in samples))
    batches = Batches(data, size, {}, "sig")
    found = [batches.lengths(i)[1] for i in range(len(batches))]
    assert [n for batch in found for n in batch] == samples


def test_audio_is_read_once(write):
    reads = []

    def counted(wav):
        reads.append(wav)
        return read_audio(wav)

    data = audio_set(write("a.wav"), write("b.wav"), pipeline=counted)
    batches = Batches(data, 1, {}, "sig")
    assert reads == []
    first = batches.load()
    batches.lengths(0)
    assert len(reads) == 2
    assert batches.load() is first


def test_the_recipes_collate_function_and_nothing_else(three):
    seen = []

    def collate(examples):
        seen.append(len(examples))
        return PaddedBatch(examples)

    options = {"collate_fn": collate, "batch_size": 1, "shuffle": True}
    batches = Batches(three, 3, options, "sig")
    assert [batch.id for batch in batches.load()] == [["u0", "u1", "u2"]]
    assert seen == [3]


@pytest.mark.parametrize("signal", ["wave", "signal"])
def test_wrong_signal(three, signal):
    with pytest.raises(ValueError) as error:
        Batches(three, 1, {}, signal).load()
    text = str(error.value)
    assert text.startswith(f"quantize.signal: a batch has no '{signal}'")
    assert "\n" not in text


def test_a_signal_that_is_no_audio(three):
    with pytest.raises(ValueError, match=r"^quantize.signal: 'id' of a batch"):
        Batches(three, 1, {}, "id").load()


def test_an_output_of_another_name(write):
    """As in set_output_keys({"sig": "wave"}): its audio is checked as well."""
    bad = write("bad.wav", np.full(4000, np.inf), subtype="FLOAT")
    data = audio_set(bad)
    data.add_dynamic_item(lambda sig: sig, takes="sig", provides="wave")
    data.set_output_keys({"id": "id", "speech": "wave"})
    with pytest.raises(AudioError, match="holds NaN or Inf"):
        check_audio(data, "wav", "speech", RATE)
    with pytest.raises(ValueError, match=r"^quantize.signal: the data set has"):
        check_audio(data, "wav", "spech", RATE)


def test_batch_of_stereo(write):
    data = audio_set(write("a.wav"), write("stereo.wav", channels=2))
    with pytest.raises(AudioError) as error:
        Batches(data, 1, {}, "sig").load()
    assert str(error.value) == (
        "utterance u1: audio of shape (1, 4000, 2), not [batch, time]; make "
        "it mono in the recipe's pipeline"
    )


def test_batch_with_nan(write):
    def broken(wav):
        return read_audio(wav) / (0 if "broken" in wav else 1)

    silence = write("broken.wav", np.zeros(3000))
    data = audio_set(write("a.wav"), silence, pipeline=broken)
    with pytest.raises(AudioError) as error:
        Batches(data, 1, {}, "sig").load()
    assert str(error.value) == (
        "utterance u1: the audio holds NaN or Inf; remove it"
    )
