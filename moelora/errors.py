"""moelora's errors: each derives from :class:`MoELoraError` and from the builtin it refines."""


class MoELoraError(Exception):
    """Base of every error raised on purpose by moelora."""


class IncompatiblePeftError(MoELoraError, ImportError):
    """The installed PEFT is outside the tested range, or no longer looks like it."""


class ConfigError(MoELoraError, ValueError):
    """A field of ``MoELoraConfig`` holds a value that is not allowed."""


class RoutingWeightsError(MoELoraError, ValueError):
    """Explicit ``routing_weights`` that cannot be applied: shape, type, value or model state."""


class UnsupportedLayerError(MoELoraError, ValueError):
    """A layer, LoRA variant or tuner for which routing has no exact meaning."""


class MergeError(MoELoraError, ValueError):
    """A routed mixture has no single merged weight."""


class CheckpointError(MoELoraError, ValueError):
    """An adapter folder whose files are missing, damaged, inconsistent or not ours."""


class AuxLossError(MoELoraError, RuntimeError):
    """The auxiliary loss could not reach the router exactly once with its weight."""


class BackendError(MoELoraError, ValueError):
    """A backend is unknown, or was asked for by name and cannot run."""


class ReportError(MoELoraError, ValueError):
    """Text, a log or options that no routing report can be made of."""


class SkillError(MoELoraError, ValueError):
    """An embedding or a skill that cannot be stored or compared."""
