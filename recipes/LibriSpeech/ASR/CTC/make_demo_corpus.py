#!/usr/bin/env python3
"""Synthesize the small English corpus that this recipe runs on by default.

The sentences come from the word lists and templates below, the speech from
two free synthesizers, eSpeak NG and Flite, one speaker id for each voice. The
result has LibriSpeech's layout (SPLIT/SPEAKER/CHAPTER/*.flac and *.trans.txt),
so the recipe reads it as it reads LibriSpeech. A sentence occurs in one split
only. The same seed and the same versions of the synthesizers give the same
files.

To make all three splits (Debian: ``apt install espeak-ng flite``):
> python make_demo_corpus.py --output_folder demo/LibriSpeech

Authors
 * The speechbrain_stablequant developers 2026
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile as sf
from scipy.signal import resample_poly

SAMPLE_RATE = 16000

# Speaker id -> (engine, voice, base speed, base pitch). For eSpeak NG the
# speed is in words per minute and the pitch is its 0-99 scale; for Flite the
# speed is a stretch of all durations and the pitch is not touched.
VOICES = {
    "1001": ("flite", "slt", 1.0, None),
    "1002": ("flite", "rms", 0.9, None),
    "1003": ("flite", "awb", 1.0, None),
    "1004": ("flite", "kal16", 1.0, None),
    "2001": ("espeak", "en-us", 165, 50),
    "2002": ("espeak", "en-us+f2", 170, 55),
    "2003": ("espeak", "en-gb+m3", 165, 40),
    "2004": ("espeak", "en-gb-x-rp+f4", 165, 50),
    "2005": ("espeak", "en-us+m7", 160, 45),
    "2006": ("espeak", "en-gb-scotland+m1", 165, 45),
}

CHAPTERS = {"train-demo": "10", "dev-demo": "20", "test-demo": "30"}

WORDS = {
    "person": (
        "farmer teacher doctor sailor baker driver painter singer soldier"
        " mother father sister brother uncle aunt child girl boy woman man"
        " captain king queen lawyer nurse student stranger neighbor hunter"
        " writer guest waiter judge miller clerk"
    ),
    "animal": (
        "dog cat horse bird fox rabbit cow sheep goat duck mouse bear wolf"
        " tiger monkey owl eagle frog turtle donkey"
    ),
    "thing": (
        "book letter table chair window door lamp clock basket bottle cup"
        " plate knife spoon hammer ladder rope wheel wagon boat ship train"
        " coat hat shirt shoe ring coin box bag key map picture mirror"
        " candle blanket pillow carpet apple bread cheese butter honey"
        " sugar soup cake orange lemon onion potato flower stone stick"
        " pencil paper violin drum guitar piano camera engine bucket shovel"
        " parcel button needle ticket"
    ),
    "place": (
        "house garden kitchen school church market village city forest"
        " river lake mountain valley bridge station harbor island castle"
        " tower cabin farm field hotel museum library hospital office"
        " factory desert beach"
    ),
    "name": (
        "mary john peter anna david susan thomas martha henry alice robert"
        " helen george emma daniel sarah victor laura simon julia"
    ),
    "adjective": (
        "old young big small little long short heavy light dark bright red"
        " blue green yellow white black brown golden silver wooden empty"
        " broken clean dirty cold warm quiet loud happy angry tired hungry"
        " brave clever gentle strange famous simple careful lonely proud"
        " rich poor tall round narrow"
    ),
    "transitive": (
        "found lost carried opened closed painted cleaned washed moved"
        " dropped watched followed liked wanted needed bought sold borrowed"
        " returned covered counted admired noticed remembered forgot"
        " described repaired touched brought kept"
    ),
    "intransitive": (
        "walked waited slept danced laughed worked lived stopped arrived"
        " traveled rested listened stayed jumped wandered whistled vanished"
        " shouted played smiled"
    ),
    "verb": (
        "find carry open close paint clean wash move drop watch follow buy"
        " sell borrow return cover count admire notice remember forget"
        " describe repair touch bring keep"
    ),
    "adverb": (
        "slowly quickly quietly loudly happily sadly carefully suddenly"
        " finally again often never always gladly gently together"
    ),
    "time": (
        "today/yesterday/this morning/every evening/after dinner"
        "/before breakfast/in the winter/last summer/at midnight"
        "/on monday/on friday/last week/all day/in the afternoon"
        "/for an hour/once more"
    ),
    "number": "two three four five six seven eight nine ten twelve twenty",
    "plural": (
        "horses birds apples books letters chairs windows candles coins"
        " boxes keys flowers stones boats wheels tickets bottles oranges"
        " potatoes buttons children soldiers"
    ),
    "preposition": "near behind inside under above beside beyond",
    "possessive": (
        "my/your/his/her/our/their/the farmer's/the teacher's"
        "/the captain's/my brother's/the queen's"
    ),
    "will": "will/won't/can/can't/must/should/didn't/wouldn't/could",
    "opener": (
        "perhaps/of course/i think/we know that/they said that"
        "/it's true that/nobody believed that/she told us that"
        "/he thought that"
    ),
}

NOUN_PHRASES = {
    "who": (
        "the {person}",
        "the {adjective} {person}",
        "{name}",
        "{possessive} {person}",
        "the {animal}",
        "a {adjective} {animal}",
    ),
    "what": (
        "the {thing}",
        "the {adjective} {thing}",
        "{possessive} {thing}",
        "a {adjective} {thing}",
        "{number} {plural}",
        "{number} {adjective} {plural}",
    ),
    "item": (
        "the {thing}",
        "the {adjective} {thing}",
        "{possessive} {thing}",
        "{possessive} {adjective} {thing}",
    ),
    "where": (
        "{preposition} the {place}",
        "{preposition} the {adjective} {place}",
        "in the {place}",
        "to the {place}",
        "from the {place}",
    ),
}

TEMPLATES = (
    "{who} {transitive} {what} {where}",
    "{who} {transitive} {what} {time}",
    "{who} {intransitive} {adverb} {where}",
    "{who} {intransitive} {where} {time}",
    "{who} and {who} {intransitive} {where}",
    "{opener} {who} {transitive} {what}",
    "{opener} {who} {intransitive} {where}",
    "{who} {will} {verb} {what} {time}",
    "{who} {will} {verb} {what} and {what}",
    "did {who} {verb} {what} {where}",
    "why did {who} {verb} {what}",
    "please {verb} {what} and {verb} {what}",
    "don't {verb} {what} {where}",
    "there are {number} {plural} {where}",
    "there's a {thing} and a {thing} {where}",
    "when {who} {intransitive} {who} {transitive} {what}",
    "the {thing} is {adjective} but the {thing} is {adjective}",
    "{item} was {adverb} {transitive} by {who}",
    "where is {item} that {who} {transitive}",
    "{who} gave {name} {what} {time}",
)

# Short pieces, for training only: CTC finds its first alignments on them.
FRAGMENTS = ("{who}", "{what}", "{where}", "{what} {where}", "{who} {adverb}")


def word_choices(kind: str) -> list:
    """Lists what may stand for one ``{kind}`` of a template.

    Arguments
    ---------
    kind : str
        A key of `WORDS`.

    Returns
    -------
    list of str
        Words, or phrases where the list is written with slashes.

    Example
    -------
    >>> word_choices("number")[:2]
    ['two', 'three']
    """
    text = WORDS[kind]
    return text.split("/") if "/" in text else text.split()


def vocabulary() -> list:
    """All distinct words that the grammar can say, sorted.

    Returns
    -------
    list of str
        Words in lower case.
    """
    templates = list(TEMPLATES) + list(FRAGMENTS)
    for phrases in NOUN_PHRASES.values():
        templates.extend(phrases)
    words = set()
    for kind in WORDS:
        words.update(" ".join(word_choices(kind)).split())
    for template in templates:
        words.update(w for w in template.split() if not w.startswith("{"))
    return sorted(words)


def fill(template: str, rng: random.Random) -> str:
    """Fills a template's blanks at random.

    Arguments
    ---------
    template : str
        Text with ``{kind}`` blanks.
    rng : random.Random
        Where the choices come from.

    Returns
    -------
    str
        The text, in lower case.
    """
    words = []
    for piece in template.split():
        if not piece.startswith("{"):
            words.append(piece)
            continue
        kind = piece[1:-1]
        if kind in NOUN_PHRASES:
            words.append(fill(rng.choice(NOUN_PHRASES[kind]), rng))
        else:
            words.append(rng.choice(word_choices(kind)))
    text = " ".join(words)
    # "a old dog" is not English.
    pieces = text.split()
    for i, word in enumerate(pieces[:-1]):
        if word == "a" and pieces[i + 1][0] in "aeiou":
            pieces[i] = "an"
    return " ".join(pieces)


def draw_sentences(count: int, seed: int) -> list:
    """Draws distinct sentences of the grammar.

    Arguments
    ---------
    count : int
        How many.
    seed : int
        Seed of the choices.

    Returns
    -------
    list of str
        Sentences in lower case, no two the same.
    """
    rng = random.Random(f"sentences {seed}")
    sentences = {}
    while len(sentences) < count:
        sentences[fill(rng.choice(TEMPLATES), rng)] = None
    return list(sentences)


def draw_fragments(count: int, seed: int) -> list:
    """Draws single words and short phrases, if it fits every word once.

    Arguments
    ---------
    count : int
        How many; the first ones are the vocabulary's words.
    seed : int
        Seed of the choices.

    Returns
    -------
    list of str
        Texts in lower case; phrases may repeat.
    """
    rng = random.Random(f"fragments {seed}")
    texts = vocabulary()
    rng.shuffle(texts)
    while len(texts) < count:
        texts.append(fill(rng.choice(FRAGMENTS), rng))
    return texts[:count]


def speak(
    text: str, speaker: str, speed: float, pitch_shift: int
) -> np.ndarray:
    """Has one voice say a text.

    Arguments
    ---------
    text : str
        What to say.
    speaker : str
        A key of `VOICES`.
    speed : float
        Factor on the voice's usual speed.
    pitch_shift : int
        Added to the pitch of an eSpeak NG voice.

    Returns
    -------
    numpy.ndarray
        The speech, 16 kHz mono, float64, silence at the ends removed.
    """
    engine, voice, base_speed, base_pitch = VOICES[speaker]
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        if engine == "flite":
            stretch = base_speed / speed
            command = ["flite", "-voice", voice]
            command += ["--setf", f"duration_stretch={stretch:.3f}"]
            command += ["-t", text, "-o", str(wav)]
        else:
            command = ["espeak-ng", "-v", voice]
            command += ["-s", str(round(base_speed * speed))]
            command += ["-p", str(base_pitch + pitch_shift)]
            command += ["-w", str(wav), text]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        audio, rate = sf.read(wav, dtype="float64")
    if rate != SAMPLE_RATE:
        audio = resample_poly(audio, SAMPLE_RATE, rate)
    loud = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]


def render(task: dict) -> str:
    """Makes one utterance's audio file.

    Arguments
    ---------
    task : dict
        ``path`` of the FLAC file, ``speaker``, ``texts`` (candidates, of which
        the first with a fitting duration is taken), ``seconds`` (shortest and
        longest) and ``seed``.

    Returns
    -------
    str
        The text that was taken.
    """
    rng = np.random.default_rng(task["seed"])
    shortest, longest = task["seconds"]
    for text in task["texts"]:
        speed = rng.uniform(0.92, 1.10)
        pitch_shift = int(rng.integers(-6, 7))
        speech = speak(text, task["speaker"], speed, pitch_shift)
        margin = rng.integers(1600, 3200, size=2)
        audio = np.pad(speech, margin)
        if shortest <= len(audio) / SAMPLE_RATE <= longest:
            break
    else:
        raise ValueError(
            f"{task['path'].name}: no candidate text lasts {shortest} to "
            f"{longest} s: draw more candidates"
        )
    peak = rng.uniform(0.04, 0.18)
    audio *= peak / np.abs(audio).max()
    # Faint noise, so that silence is not digital zero.
    level = np.sqrt(np.mean(speech**2)) * peak / np.abs(speech).max()
    level *= 10 ** (-rng.uniform(30, 45) / 20)
    audio += rng.normal(0.0, level, size=len(audio))
    task["path"].parent.mkdir(parents=True, exist_ok=True)
    sf.write(
        task["path"],
        audio,
        SAMPLE_RATE,
        subtype="PCM_16",
        format="FLAC",
        compression_level=1.0,
    )
    return text


def make_split(
    output_folder: Path,
    split: str,
    pools: list,
    seconds: tuple,
    seed: int,
    jobs: int,
) -> None:
    """Makes one split.

    Arguments
    ---------
    output_folder : Path
        The corpus folder; the split becomes a folder in it.
    split : str
        A key of `CHAPTERS`.
    pools : list of list of str
        For each utterance its candidate texts.
    seconds : tuple of float
        Shortest and longest utterance.
    seed : int
        Seed of speed, pitch, gain and noise.
    jobs : int
        Processes.
    """
    speakers = sorted(VOICES)
    if split != "train-demo":
        # The small model hardly learns the Flite voices: training only.
        speakers = [s for s in speakers if VOICES[s][0] == "espeak"]
    counts = dict.fromkeys(speakers, 0)
    tasks = []
    for index, texts in enumerate(pools):
        speaker = speakers[index % len(speakers)]
        chapter = f"{speaker}-{CHAPTERS[split]}"
        name = f"{chapter}-{counts[speaker]:04d}.flac"
        counts[speaker] += 1
        folder = output_folder / split / speaker / CHAPTERS[split]
        tasks.append(
            {
                "path": folder / name,
                "speaker": speaker,
                "texts": texts,
                "seconds": seconds,
                "seed": [seed, int(CHAPTERS[split]), index],
            }
        )
    with ProcessPoolExecutor(jobs) as pool:
        spoken = list(pool.map(render, tasks, chunksize=16))
    transcripts = {}
    for task, text in zip(tasks, spoken, strict=True):
        line = f"{task['path'].stem} {text.upper()}\n"
        transcripts.setdefault(task["path"].parent, []).append(line)
    for folder, lines in transcripts.items():
        name = f"{folder.parent.name}-{folder.name}.trans.txt"
        (folder / name).write_text("".join(sorted(lines)), encoding="utf-8")
    print(f"{split}: {len(tasks)} utterances of {len(counts)} voices")


def parse_arguments(argv: list | None = None) -> argparse.Namespace:
    """Reads the command line.

    Arguments
    ---------
    argv : list of str
        Arguments; those of the process when None.

    Returns
    -------
    argparse.Namespace
        The values.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output_folder", type=Path, required=True, help="corpus folder")
    add("--splits", nargs="+", default=list(CHAPTERS), choices=list(CHAPTERS))
    add("--train_sentences", type=int, default=6000, help="in train-demo")
    add("--train_fragments", type=int, default=2000, help="in train-demo")
    add("--eval_sentences", type=int, default=80, help="in dev- and test-demo")
    add("--seed", type=int, default=1234)
    add("--jobs", type=int, default=2, help="parallel processes")
    return parser.parse_args(argv)


def main(argv: list | None = None) -> None:
    """Makes the splits that the command line asks for.

    Arguments
    ---------
    argv : list of str
        Arguments; those of the process when None.
    """
    args = parse_arguments(argv)
    for program in ("espeak-ng", "flite"):
        if shutil.which(program) is None:
            sys.exit(
                f"{program}: not found: install it (apt install flite"
                " espeak-ng)"
            )
    # The pools do not depend on --splits: a split made alone is the same.
    n, candidates = args.eval_sentences, 8
    sentences = draw_sentences(
        2 * n * candidates + args.train_sentences, args.seed
    )
    pools = {}
    for number, split in enumerate(("dev-demo", "test-demo")):
        first = number * n * candidates
        pools[split] = [
            sentences[first + i * candidates :][:candidates] for i in range(n)
        ]
    texts = draw_fragments(args.train_fragments, args.seed)
    texts += sentences[2 * n * candidates :]
    random.Random(f"order {args.seed}").shuffle(texts)
    pools["train-demo"] = [[text] for text in texts]
    for split in args.splits:
        seconds = (0.0, 60.0) if split == "train-demo" else (2.0, 3.0)
        make_split(
            args.output_folder,
            split,
            pools[split],
            seconds,
            args.seed,
            args.jobs,
        )


if __name__ == "__main__":
    main()
