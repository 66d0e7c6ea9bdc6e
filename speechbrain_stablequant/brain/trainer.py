"""SpeechBrain's own training loop, for quantization-aware training.

``Brain.fit`` runs with the recipe's forward pass, loss, data and options, but
with other parameters and optimizers. The recipe's own training state
(checkpoints, schedules, epoch counters, logs, running statistics) is untouched.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import speechbrain as sb
import torch
from speechbrain.processing.features import InputNormalization
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from ..utils.patching import restored, restored_values, shadowed
from .data import audio_of, dataset_of, utterance_ids
from .passes import first_tensor, reproducible

# Modules that update statistics in training; here they stay the float model's.
_STATISTICS = (_BatchNorm, InputNormalization)


class BrainTrainer:
    """Trains a Brain on the recipe's training set.

    ``seed`` controls all randomness but the order of data, which is the
    recipe's.
    """

    def __init__(
        self,
        brain: sb.Brain,
        train_set: Dataset | DataLoader,
        loader_options: Mapping[str, Any],
        signal: str,
        seed: int,
    ):
        self.brain = brain
        self.train_set = train_set
        self.loader_options = dict(loader_options)
        self.signal = signal
        self.seed = seed
        self.ids = utterance_ids(dataset_of(train_set))

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._batches

    @cached_property
    def _batches(self) -> int:
        with restored(self.brain):
            return len(self._loader())

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the training, apart from data and their order."""
        options = self.loader_options
        loading = ("batch_size", "shuffle", "drop_last")
        training = ("precision", "max_grad_norm", "grad_accumulation_factor")
        return {
            **{name: options[name] for name in loading if name in options},
            **{name: getattr(self.brain, name) for name in training},
            "batches": self._batches,
        }

    def _loader(self) -> DataLoader:
        brain, loader = self.brain, self.train_set
        if not isinstance(loader, DataLoader):
            brain.train_sampler = None  # It belongs to another loader.
            options = {**self.loader_options, "ckpt_prefix": None}
            loader = brain.make_dataloader(loader, sb.Stage.TRAIN, **options)
        # Brain.fit sets the sampler's epoch: the same order in each run.
        for sampler in (loader.batch_sampler, loader.sampler):
            if brain.train_sampler is None and hasattr(sampler, "set_epoch"):
                brain.train_sampler = sampler
        return loader

    def epoch(
        self,
        number: int,
        optimizers: Mapping[str, torch.optim.Optimizer],
        before_batch: Callable[[int], None],
        distill: float,
        resting: Callable[[], AbstractContextManager[None]],
    ) -> float:
        """Run one epoch of ``Brain.fit``, see the protocol ``Trainer``."""
        brain, modules = self.brain, self.brain.modules
        still = [m for m in modules.modules() if isinstance(m, _STATISTICS)]
        start_batch = brain.on_fit_batch_start
        losses: list[float] = []

        def on_fit_batch_start(batch: Any, should_step: bool) -> None:
            for module in still:
                module.eval()
            start_batch(batch, should_step)
            before_batch(brain.step - 1)

        def on_stage_end(stage: sb.Stage, loss: float, epoch: int) -> None:
            losses.append(float(loss))

        with (
            restored(brain),
            reproducible(self.seed + number),
            trainable(modules, optimizers.values()),
        ):
            loader = self._loader()
            changes = {
                "test_only": False,
                "checkpointer": None,
                "profiler": None,
                "optimizer_step_limit": None,
                "ckpt_interval_minutes": 0,
                "ckpt_interval_steps": 0,
                "step": 0,
                "avg_train_loss": 0.0,
                "optimizers_dict": dict(optimizers),
                "on_fit_start": lambda: None,
                "on_fit_batch_start": on_fit_batch_start,
                # A recipe's schedule would change the learning rate.
                "on_fit_batch_end": lambda *args: None,
                "on_stage_end": on_stage_end,
                "freeze_optimizers": lambda every: every,
            }
            # A recipe's overrides would step its own optimizers.
            for name in ("fit_batch", "optimizers_step", "zero_grad"):
                changes[name] = partial(getattr(sb.Brain, name), brain)
            if distill:
                changes.update(self._distilled(distill, resting))
            vars(brain).update(changes)
            sb.Brain.fit(brain, [number], loader, None, progressbar=False)
        modules.eval()
        return losses[0]

    def _distilled(
        self,
        distill: float,
        resting: Callable[[], AbstractContextManager[None]],
    ) -> dict[str, Callable]:
        """The Brain's forward pass and loss, with a float teacher."""
        brain = self.brain
        forward, objectives = brain.compute_forward, brain.compute_objectives
        taught: list[torch.Tensor] = []

        def compute_forward(batch: Any, stage: sb.Stage) -> Any:
            modes = {m: m.training for m in brain.modules.modules()}
            # The teacher gets the same data augmentation as the student.
            with resting(), torch.no_grad(), reproducible(None):
                brain.modules.eval()
                output = forward(copy.copy(batch), stage)
            for module, mode in modes.items():
                module.training = mode
            taught[:] = [_log_probabilities(output)]
            return forward(batch, stage)

        def compute_objectives(
            predictions: Any, batch: Any, stage: sb.Stage
        ) -> torch.Tensor:
            _, lengths = audio_of(batch, self.signal)
            learned = _log_probabilities(predictions)
            loss = distill * divergence(taught[0], learned, lengths)
            if distill < 1:
                own = objectives(predictions, batch, stage)
                loss = loss + (1 - distill) * own
            return loss

        return {
            "compute_forward": compute_forward,
            "compute_objectives": compute_objectives,
        }


def _log_probabilities(output: Any) -> torch.Tensor:
    """Log probabilities from the first output, which may be logits."""
    return first_tensor(output).float().log_softmax(-1)


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Mean KL(teacher || student) over real frames, of log probabilities
    [batch, time, classes] and relative lengths [batch]."""
    frames = teacher.shape[1]
    # A recipe may append augmented copies of its utterances.
    lengths = lengths.to(teacher.device).repeat(len(teacher) // len(lengths))
    ends = (lengths * frames).round()[:, None]
    real = torch.arange(frames, device=teacher.device) < ends
    each = F.kl_div(student, teacher, reduction="none", log_target=True)
    return (each.sum(-1) * real).sum() / real.sum()


@contextmanager
def trainable(
    modules: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[None]:
    """Train the optimizers' parameters alone, through frozen modules too;
    restore flags and buffers afterwards.

    SpeechBrain's HuggingFace wrappers compute a frozen model without gradients,
    and HuggingFace's front end requires gradients of its input, which are not
    needed.
    """
    groups = (group for x in optimizers for group in x.param_groups)
    trained = {id(x) for group in groups for x in group["params"]}
    with ExitStack() as stack:
        for module in modules.modules():
            # Gradient checkpointing needs the switches.
            if getattr(module, "gradient_checkpointing", False):
                continue
            for switch in ("freeze", "_requires_grad"):
                if vars(module).get(switch) is True:
                    stack.enter_context(shadowed(module, switch, False))
        stack.enter_context(restored_values(modules.buffers()))
        for parameter in modules.parameters():
            if id(parameter) not in trained:
                before = parameter.requires_grad
                stack.callback(parameter.requires_grad_, before)
                parameter.requires_grad_(False)
        yield
