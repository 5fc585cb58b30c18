"""Mixture-of-experts routing for Hugging Face PEFT, as a plugin.

``import moelora`` teaches every PEFT LoRA model the forward argument ``routing_weights`` and makes
:class:`MoELoraConfig` a config that ``get_peft_model`` takes.
"""

from moelora import _peft
from moelora._peft import install, is_installed, uninstall
from moelora.callbacks import MoETrainerCallback
from moelora.composition import ComposedExpert, Composition, compose, freeze_experts
from moelora.config import MoELoraConfig
from moelora.description import (
    DescribedExpert,
    DescribedRouter,
    Description,
    ExpertLoad,
    describe,
)
from moelora.distance import RoutedDistance
from moelora.errors import (
    AuxLossError,
    CheckpointError,
    ConfigError,
    IncompatiblePeftError,
    MergeError,
    MoELoraError,
    ReportError,
    RoutingWeightsError,
    SkillError,
    UnsupportedLayerError,
)
from moelora.expert_record import ExpertRecord
from moelora.experts import ExpertManager
from moelora.export import ExportedExpert, export_expert
from moelora.inference import Preparation, prepare_for_inference
from moelora.losses import load_balancing_loss, router_z_loss, switch_loss
from moelora.merge import MergedExperts, merge_experts
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
from moelora.report import RoutingReport, routing_report
from moelora.router import Router
from moelora.routing import Routing, top_k_routing
from moelora.schedule import TwoPhaseSchedule
from moelora.skill_library import SkillLibrary

__version__ = "0.1.0"

__all__ = [
    "AuxLossError",
    "CheckpointError",
    "ComposedExpert",
    "Composition",
    "ConfigError",
    "DescribedExpert",
    "DescribedRouter",
    "Description",
    "ExpertLoad",
    "ExpertManager",
    "ExpertRecord",
    "ExportedExpert",
    "IncompatiblePeftError",
    "MergeError",
    "MergedExperts",
    "MoELoraConfig",
    "MoELoraError",
    "MoEOptimizer",
    "MoETrainerCallback",
    "Novelty",
    "NoveltyDetector",
    "Preparation",
    "ReportError",
    "RoutedDistance",
    "Router",
    "Routing",
    "RoutingRecord",
    "RoutingReport",
    "RoutingWeightsError",
    "SkillError",
    "SkillLibrary",
    "TwoPhaseSchedule",
    "UnsupportedLayerError",
    "compose",
    "describe",
    "export_expert",
    "freeze_experts",
    "install",
    "is_installed",
    "load_balancing_loss",
    "mark_mature",
    "merge_experts",
    "param_groups",
    "pool_hidden_states",
    "prepare_for_inference",
    "record_routing",
    "router_entropy",
    "router_z_loss",
    "routing_report",
    "skill_embeddings",
    "switch_loss",
    "top_k_routing",
    "uninstall",
    "update_optimizer",
]

_peft.install()
