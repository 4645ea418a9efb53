"""The errors of jaxmerge: one small hierarchy, every message with a remedy.

Each message says which expert and which tensor, what was found, what was expected and what to do.
When one of these is raised nothing has been written, moved or lost.
"""


class MergeError(Exception):
    """Base of every error that jaxmerge raises on purpose."""


class StructureError(MergeError):
    """Parameters do not have the same tensors: some are missing, extra or named twice."""


class ShapeError(MergeError):
    """A tensor has another shape in one of the experts than in the base."""


class DTypeError(MergeError):
    """A tensor has another dtype in one of the experts than in the base, or one that cannot be merged."""


class NonFiniteError(MergeError):
    """An input holds NaN or infinity."""


class CheckpointError(MergeError):
    """A checkpoint cannot be opened, read or written: truncated, bad header, bad index, disk full."""


class BudgetError(MergeError):
    """The work does not fit into the memory or I/O budget that was given."""


class ConflictError(MergeError):
    """The output exists already, equals an input, or somebody else is writing it."""


class RecipeError(MergeError):
    """A method, a coefficient, a rule or a recipe is not configured in a way that can work."""
