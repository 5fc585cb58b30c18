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
    SkillError,
    UnsupportedLayerError,
)
from moelora.expert_record import ExpertRecord
from moelora.experts import ExpertManager
from moelora.losses import load_balancing_loss, router_z_loss, switch_loss
from moelora.mixture import mark_mature
from moelora.novelty import (
    Novelty,
    NoveltyDetector,
    pool_hidden_states,
    router_entropy,
    skill_embeddings,
)
from moelora.optim import MoEOptimizer, param_groups
from moelora.optimizer import update_optimizer
from moelora.record import RoutingRecord, record_routing
from moelora.router import Router
from moelora.routing import Routing, top_k_routing
from moelora.skill_library import SkillLibrary

__version__ = "0.1.0"

__all__ = [
    "AuxLossError",
    "CheckpointError",
    "ConfigError",
    "ExpertManager",
    "ExpertRecord",
    "IncompatiblePeftError",
    "MergeError",
    "MoELoraConfig",
    "MoELoraError",
    "MoEOptimizer",
    "MoETrainerCallback",
    "Novelty",
    "NoveltyDetector",
    "Router",
    "Routing",
    "RoutingRecord",
    "RoutingWeightsError",
    "SkillError",
    "SkillLibrary",
    "UnsupportedLayerError",
    "install",
    "is_installed",
    "load_balancing_loss",
    "mark_mature",
    "param_groups",
    "pool_hidden_states",
    "record_routing",
    "router_entropy",
    "router_z_loss",
    "skill_embeddings",
    "switch_loss",
    "top_k_routing",
    "uninstall",
    "update_optimizer",
]

_peft.install()
