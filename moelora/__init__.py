"""Mixture-of-experts routing for Hugging Face PEFT, as a plugin.

``import moelora`` teaches every PEFT LoRA model the forward argument ``routing_weights`` and makes
:class:`MoELoraConfig` a config that ``get_peft_model`` takes.
"""

from moelora import _peft
from moelora._peft import install, is_installed, uninstall
from moelora.callbacks import MoETrainerCallback
from moelora.config import MoELoraConfig
from moelora.errors import (
    AuxLossError,
    CheckpointError,
    ConfigError,
    IncompatiblePeftError,
    MergeError,
    MoELoraError,
    RoutingWeightsError,
    UnsupportedLayerError,
)
from moelora.losses import load_balancing_loss, router_z_loss, switch_loss
from moelora.mixture import mark_mature
from moelora.record import RoutingRecord, record_routing
from moelora.router import Router
from moelora.routing import Routing, top_k_routing

__version__ = "0.1.0"

__all__ = [
    "AuxLossError",
    "CheckpointError",
    "ConfigError",
    "IncompatiblePeftError",
    "MergeError",
    "MoELoraConfig",
    "MoELoraError",
    "MoETrainerCallback",
    "Router",
    "Routing",
    "RoutingRecord",
    "RoutingWeightsError",
    "UnsupportedLayerError",
    "install",
    "is_installed",
    "load_balancing_loss",
    "mark_mature",
    "record_routing",
    "router_z_loss",
    "switch_loss",
    "top_k_routing",
    "uninstall",
]

_peft.install()
