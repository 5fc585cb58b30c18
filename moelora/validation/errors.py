"""The error of a validation that cannot run as asked."""

from moelora.errors import MoELoraError


class ValidationError(MoELoraError, ValueError):
    """An argument of a validation that is out of its range or does not fit the checkpoint."""
