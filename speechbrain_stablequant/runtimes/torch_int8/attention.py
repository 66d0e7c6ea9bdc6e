"""Self-attention of packed utterances."""

from collections.abc import Sequence

import torch


def attend(
    qkv: torch.Tensor, lengths: Sequence[int], heads: int
) -> torch.Tensor:
    """Attention of packed utterances: ``qkv`` [rows, 3 * channels], query
    already scaled, to [rows, channels]. ``lengths``: frames of each
    utterance; rows after these are zero."""
    total, width = qkv.shape
    out = qkv.new_empty(total, width // 3)
    columns = qkv.view(total, 3 * heads, -1).unbind(1)
    targets = out.view(total, heads, -1).unbind(1)
    # One buffer for all heads: allocation costs more than the computation.
    scores = qkv.new_empty(max(lengths) ** 2)
    for head, target in enumerate(targets):
        query, key, value = (columns[head + i * heads] for i in range(3))
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            weights = scores[: length**2].view(length, length)
            torch.mm(query[part], key[part].t(), out=weights)
            torch.softmax(weights, -1, out=weights)
            torch.mm(weights, value[part], out=target[part])
            start += length
    out[sum(lengths) :] = 0
    return out
