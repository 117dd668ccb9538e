"""What stops an optimization."""


class OptimizationError(Exception):
    """It cannot be done as asked; the message names the option and what would be right."""
