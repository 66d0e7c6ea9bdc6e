"""The utterances that quantization changed most, aligned word by word."""

from collections.abc import Sequence
from itertools import zip_longest

import jiwer

from ..core.error_rates import count_errors
from .results import SetResult

_SHOWN = 10


def worst_utterances(result: SetResult) -> list[dict]:
    """Utterances with more word errors than the float model makes, the worst
    first: at most ten."""
    both = result.baseline.transcripts, result.quantized.transcripts
    errors = [count_errors(x, "word")[:, 1:].sum(1).tolist() for x in both]
    rows = [
        {
            "id": one.id,
            "reference": one.reference,
            "float": one.hypothesis,
            "quantized": two.hypothesis,
            "errors": [before, after],
        }
        for one, two, before, after in zip(*both, *errors, strict=True)
        if after > before
    ]
    rows.sort(key=lambda x: (x["errors"][0] - x["errors"][1], x["id"]))
    return rows[:_SHOWN]


def aligned(row: dict) -> list[tuple[str, str, str]]:
    """Columns of words: reference, float, quantized; empty where none is."""
    words = row["reference"].split()
    systems = [_slots(words, row[k].split()) for k in ("float", "quantized")]
    columns: list[tuple[str, str, str]] = []
    for i in range(len(words) + 1):
        inserted = (extra[i] for extra, _ in systems)
        rows = zip_longest(*inserted, fillvalue="")
        columns += [("", one, two) for one, two in rows]
        if i < len(words):
            columns.append((words[i], *(found[i] for _, found in systems)))
    return columns


def _slots(
    reference: Sequence[str], words: Sequence[str]
) -> tuple[list[list[str]], list[str]]:
    """Words inserted before each word of the reference, and those in its
    place."""
    extra: list[list[str]] = [[] for _ in range(len(reference) + 1)]
    found = [""] * len(reference)
    if not reference:
        extra[0] += words
        return extra, found
    text = " ".join(words)
    (chunks,) = jiwer.process_words(" ".join(reference), text).alignments
    for chunk in chunks:
        start, end = chunk.ref_start_idx, chunk.ref_end_idx
        heard = words[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "insert":
            extra[start] += heard
        elif chunk.type != "delete":
            found[start:end] = heard
    return extra, found


def as_lines(row: dict) -> list[str]:
    """The same as three lines of text."""
    names = ("reference", "float", "quantized")
    columns = [names, *aligned(row)]
    widths = [max(map(len, column)) for column in columns]
    return [
        " ".join(
            column[i].ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ).rstrip()
        for i in range(len(names))
    ]
