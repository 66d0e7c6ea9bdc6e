"""Self-attention of packed utterances."""

from collections.abc import Sequence

import torch


def attend(
    qkv: torch.Tensor, lengths: Sequence[int], heads: int
) -> torch.Tensor:
    """softmax(query . key) . value of each utterance and head.

    Arguments
    ---------
    qkv : torch.Tensor
        [frames, 3 * channels]: query, already divided by the square root of
        the width of a head, key and value of the utterances one after the
        other.
    lengths : sequence of int
        Frames of each utterance; their sum is that of ``qkv``.
    heads : int
        Number of heads.

    Returns
    -------
    torch.Tensor
        [frames, channels] of the same dtype.
    """
    total, width = qkv.shape
    out = qkv.new_empty(total, width // 3)
    columns = qkv.view(total, 3 * heads, -1).unbind(1)
    targets = out.view(total, heads, -1).unbind(1)
    # One for all heads: memory that is new each time costs more than what is
    # computed in it.
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
    return out
