"""Parts of a recognizer, as a plan decides how to execute them."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Leaf:
    """An argument of a part, or a part of one."""

    #: Of the longest call, batch 1; None: a constant.
    shape: list[int] | None = None
    dtype: str = ""  # torch's name
    #: Axes whose length changes.
    dynamic: list[int] = field(default_factory=list)
    batched: bool = False  # whether axis 0 counts the utterances
    #: The constant; of a tensor its values if they are few, or its one value.
    value: Any = None

    @property
    def free(self) -> list[int]:
        """Axes that are of any length."""
        return [*([0] if self.batched else []), *self.dynamic]


@dataclass(frozen=True)
class Part:
    """A module that is executed as one graph, layer by layer, or in float,
    with weights that are stored as integers."""

    name: str  # path in the Brain's modules
    executes: Literal["graph", "layers", "float"]
    reason: str  # one sentence
    #: Milliseconds of one pass over the batches that it was timed on, by what
    #: it may execute.
    ms: dict[str, float] = field(default_factory=dict)
    #: How a graph is captured; a decoder's is one step.
    way: Literal["trace", "export", "steps", ""] = ""
    #: Nesting of the arguments, as written by torch's pytree.
    structure: str = ""
    leaves: list[Leaf] = field(default_factory=list)
    #: Outputs that the recognizer reads, by position; empty: all.
    read: list[int] = field(default_factory=list)
