"""What can be wrong with a distillation."""


class DistillationError(Exception):
    """The distillation cannot be done as asked; the message says why and what would be right."""


class Interrupted(DistillationError):  # noqa: N818 - nothing is wrong
    """Learning was stopped from outside; the same command goes on from there."""
