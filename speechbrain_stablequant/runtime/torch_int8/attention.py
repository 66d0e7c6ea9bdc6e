"""Self-attention of packed utterances."""

from collections.abc import Sequence

import torch


def attend(
    qkv: torch.Tensor,
    lengths: Sequence[int],
    heads: int,
    out: torch.Tensor,
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
    out : torch.Tensor
        Float [frames, channels], written.

    Returns
    -------
    torch.Tensor
        ``out``.
    """
    total, width = qkv.shape
    parts = qkv.view(total, 3, heads, width // (3 * heads))
    target = out.view(total, heads, -1)
    start = 0
    for length in lengths:
        end = start + length
        query, key, value = parts[start:end].permute(1, 2, 0, 3)
        for head in range(heads):
            scores = query[head] @ key[head].T
            weights = torch.softmax(scores, -1)
            target[start:end, head] = weights @ value[head]
        start = end
    return out
