"""The transducer loss on a CPU: upstream's own needs a CUDA device."""

import torch


def transducer_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    input_lens: torch.Tensor,
    target_lens: torch.Tensor,
    blank_index: int = 0,
    reduction: str = "mean",
) -> torch.Tensor:
    """``speechbrain.nnet.losses.transducer_loss``, with relative lengths.

    Example
    -------
    >>> logits = torch.zeros(1, 2, 2, 2)
    >>> full = torch.ones(1)
    >>> loss = transducer_loss(logits, torch.ones(1, 1).long(), full, full)
    >>> round(loss.exp().item(), 3)  # 2 alignments of 3 steps, each 1 in 8
    4.0
    """
    frames = (input_lens * logits.shape[1]).round().long()
    labels = (target_lens * targets.shape[1]).round().long()
    log_probs = logits.log_softmax(-1)
    losses = []
    for b, (t, u) in enumerate(zip(frames, labels, strict=True)):
        blank = log_probs[b, :t, : u + 1, blank_index]
        index = targets[b, :u].long().expand(int(t), int(u))[..., None]
        emit = log_probs[b, :t, :u].gather(-1, index)[..., 0]
        # log of what labels alone give, up to each label of a frame.
        emitted = torch.nn.functional.pad(emit.cumsum(1), (1, 0))
        alpha = emitted[0]
        for frame in range(1, int(t)):
            came = alpha + blank[frame - 1] - emitted[frame]
            alpha = emitted[frame] + came.logcumsumexp(0)
        losses.append(-(alpha[u] + blank[-1, u]))
    loss = torch.stack(losses)
    return loss.mean() if reduction in ("mean", "batchmean") else loss


def transducer_losses(*args: torch.Tensor) -> torch.Tensor:
    """That of each utterance."""
    return transducer_loss(*args, reduction="none")
