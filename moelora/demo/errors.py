"""What goes wrong in a demo through its input, and is told in one line."""

from moelora.errors import MoELoraError


class DemoError(MoELoraError, ValueError):
    """An argument, a file or a missing package that the user of the demo can mend."""
