"""``MoELoraConfig``: one mixture of LoRA experts, as one PEFT adapter."""

import math
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from moelora._peft import LoraConfig
from moelora.errors import ConfigError

RouterType = Literal["learned_with_maturity", "learned", "fixed"]
RouterScope = Literal["module", "layer", "model"]
LoadBalanceLossType = Literal["aux_loss", "z_loss", "switch"]

#: The type written to ``adapter_config.json``. In memory a mixture is a LoRA adapter, so that every
#: branch of PEFT and its users that asks for LORA serves it; on disk it has its own name, so that
#: loading it without moelora fails instead of giving a wrong plain LoRA.
DISK_PEFT_TYPE = "MOELORA"
#: Version of the files a mixture is saved to; a newer one is refused.
FORMAT_VERSION = 1
#: More experts than this in one layer is taken for a damaged config.
MAX_EXPERTS = 65536

#: The fields that say how tokens are routed.
ROUTING_FIELDS = (
    "use_moe_routing",
    "top_k_experts",
    "router_hidden_size",
    "router_aux_loss_coef",
    "router_temperature",
    "router_type",
    "expert_capacity_factor",
    "expert_dropout",
    "load_balance_loss_type",
    "router_scope",
    "fixed_routing_weights",
    "joins_mixture",
    "balance_over_ranks",
)
# LoRA options whose meaning is that of one always-on update of the base weight, or that keep
# parameters which a stack of experts cannot share.
_UNSTACKABLE_FIELDS = (
    "use_dora",
    "lora_bias",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
    "target_parameters",
)
_STACKABLE_INITS = (True, False, "gaussian")


def no_type_check(cls: type["MoELoraConfig"]) -> type["MoELoraConfig"]:
    """Mark, by its name, a class that the tests' run-time type checker leaves alone.

    Fields of a wrong type have to reach the checks below. ``typing.no_type_check`` would also hide
    the annotations, which argument parsers read.
    """
    return cls


@no_type_check
@dataclass
class MoELoraConfig(LoraConfig):
    """Configuration of a mixture of ``num_experts`` LoRA experts in one PEFT adapter.

    ``r`` and ``lora_alpha`` (and their patterns) are per expert. In memory ``peft_type`` is LORA;
    on disk it is ``"MOELORA"``. All fields of :class:`peft.LoraConfig` keep their meaning.

    Args:
        use_moe_routing: route tokens over the experts. False makes experts that are always on
            (and, with ``num_experts=1``, one plain LoRA), to be weighted by explicit
            ``routing_weights``.
        num_experts: experts in this adapter, at least 2 when routing.
        top_k_experts: experts that serve a token, between 1 and ``num_experts``.
        router_hidden_size: width of the router's hidden layer; None for a linear router.
        router_aux_loss_coef: weight of the auxiliary loss in ``outputs.loss``; 0 switches it off.
        router_temperature: divides the router logits before softmax and top-k.
        router_type: ``"learned"``, ``"learned_with_maturity"`` (dense while any expert is immature)
            or ``"fixed"`` (constant weights, no parameters, can be merged).
        expert_capacity_factor: in training an expert takes at most this multiple of its even share
            of the routed slots; None for no limit.
        expert_dropout: probability that a selected expert is left out for a token in training.
        load_balance_loss_type: ``"aux_loss"`` (all k slots), ``"switch"`` (top-1) or ``"z_loss"``.
        router_scope: ``"module"``, a router in every adapted layer that reads the layer's own
            input; ``"layer"``, one per transformer block that reads the block's input; ``"model"``,
            one that reads the final hidden states of a first pass without adapters (two passes).
        fixed_routing_weights: the weights of ``router_type="fixed"``; None for uniform.
        joins_mixture: this adapter's experts are made to join those of the other active adapters,
            with whose router logits its own are concatenated. It may then hold a single expert
            (which is not routed while it is active alone), ``top_k_experts`` counts over all of
            them, and one that comes later starts immature.
        expert_names: what the experts are called in files and reports, as plain folder names; None
            for numbers.
        balance_over_ranks: when several processes train, balance the experts over the tokens of
            all of them, as one process would over the joined batch. False balances each process's
            own tokens and takes the mean of their losses, with no communication.
        moelora_format: version of the saved format.

    Raises:
        ConfigError: a ``ValueError`` that names the field, the value and what is allowed.

    Example:
        >>> config = MoELoraConfig(num_experts=8, top_k_experts=2, target_modules=["q_proj"])
        >>> config.to_dict()["peft_type"]
        'MOELORA'
    """

    use_moe_routing: bool = field(default=True)
    num_experts: int = field(default=4)
    top_k_experts: int = field(default=2)
    router_hidden_size: int | None = field(default=None)
    router_aux_loss_coef: float = field(default=0.01)
    router_temperature: float = field(default=2.0)
    router_type: RouterType = field(default="learned_with_maturity")
    expert_capacity_factor: float | None = field(default=1.25)
    expert_dropout: float = field(default=0.0)
    load_balance_loss_type: LoadBalanceLossType = field(default="aux_loss")
    router_scope: RouterScope = field(default="module")
    fixed_routing_weights: list[float] | None = field(default=None)
    joins_mixture: bool = field(default=False)
    balance_over_ranks: bool = field(default=False)
    expert_names: list[str] | None = field(default=None)
    moelora_format: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_format(self.moelora_format)
        _check_flags(self)
        _check_counts(self)
        _check_numbers(self)
        _check_fixed_weights(self)
        _check_expert_names(self)
        if self.num_experts > 1 or self.use_moe_routing:
            _check_stackable(self)
        if not self.use_moe_routing:
            _warn_unused_routing_fields(self)

    @property
    def routed(self) -> bool:
        """Whether tokens are routed when no explicit weights are given."""
        return self.use_moe_routing

    @property
    def has_router(self) -> bool:
        """Whether the adapter owns router parameters."""
        return self.use_moe_routing and self.router_type != "fixed"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict, with the type under which a mixture is stored."""
        return {**super().to_dict(), "peft_type": DISK_PEFT_TYPE}


def _fail(name: str, value: object, allowed: str) -> None:
    raise ConfigError(f"{name} must be {allowed}, got {value!r}.")


def _check_format(version: Any) -> None:
    if not is_int(version) or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(
            f"moelora_format {version!r} is not known to this release, which reads 1 to "
            f"{FORMAT_VERSION}. Upgrade moelora to load this adapter."
        )


def _check_flags(config: MoELoraConfig) -> None:
    use_moe_routing: Any = config.use_moe_routing
    if not isinstance(use_moe_routing, bool):
        _fail("use_moe_routing", use_moe_routing, "True or False")
    balance_over_ranks: Any = config.balance_over_ranks
    if not isinstance(balance_over_ranks, bool):
        _fail("balance_over_ranks", balance_over_ranks, "True or False")
    joins_mixture: Any = config.joins_mixture
    if not isinstance(joins_mixture, bool):
        _fail("joins_mixture", joins_mixture, "True or False")
    choices: dict[str, Any] = {
        "router_type": RouterType,
        "router_scope": RouterScope,
        "load_balance_loss_type": LoadBalanceLossType,
    }
    for name, literal in choices.items():
        allowed = get_args(literal)
        value: Any = getattr(config, name)
        if not isinstance(value, str) or value not in allowed:
            _fail(name, value, f"one of {', '.join(map(repr, allowed))}")
    if config.joins_mixture and config.router_type == "fixed":
        raise ConfigError(
            "joins_mixture=True needs a learned router, got router_type='fixed': constant weights "
            "are not concatenated."
        )


def _check_counts(config: MoELoraConfig) -> None:
    is_whole = config.use_moe_routing and not config.joins_mixture
    least = 2 if is_whole else 1
    suffix = " when use_moe_routing=True" if is_whole else ""
    if not is_int(config.num_experts) or not least <= config.num_experts <= MAX_EXPERTS:
        _fail("num_experts", config.num_experts, f"an integer in [{least}, {MAX_EXPERTS}]{suffix}")
    if not is_int(config.top_k_experts) or config.top_k_experts < 1:
        _fail("top_k_experts", config.top_k_experts, "an integer of at least 1")
    if is_whole and config.top_k_experts > config.num_experts:
        _fail(
            "top_k_experts",
            config.top_k_experts,
            f"between 1 and num_experts={config.num_experts}",
        )
    if not is_int(config.r) or config.r < 1:
        _fail("r", config.r, "an integer of at least 1")
    if not is_number(config.lora_alpha):
        _fail("lora_alpha", config.lora_alpha, "a finite number")
    hidden = config.router_hidden_size
    if hidden is not None and (not is_int(hidden) or not 1 <= hidden <= 2**20):
        _fail("router_hidden_size", hidden, f"None or an integer in [1, {2**20}]")


def _check_numbers(config: MoELoraConfig) -> None:
    if not is_number(config.router_temperature) or config.router_temperature <= 0:
        _fail("router_temperature", config.router_temperature, "a finite number > 0")
    if not is_number(config.router_aux_loss_coef) or config.router_aux_loss_coef < 0:
        _fail("router_aux_loss_coef", config.router_aux_loss_coef, "a finite number >= 0")
    factor = config.expert_capacity_factor
    if factor is not None and (not is_number(factor) or factor <= 0):
        _fail("expert_capacity_factor", factor, "None or a finite number > 0")
    if not is_number(config.expert_dropout) or not 0 <= config.expert_dropout < 1:
        _fail("expert_dropout", config.expert_dropout, "a number in [0, 1)")


def _check_fixed_weights(config: MoELoraConfig) -> None:
    weights = config.fixed_routing_weights
    if weights is None:
        return
    if config.router_type != "fixed":
        raise ConfigError(
            "fixed_routing_weights needs router_type='fixed', got router_type="
            f"{config.router_type!r}."
        )
    if (
        not isinstance(weights, list | tuple)
        or len(weights) != config.num_experts
        or not all(is_number(weight) for weight in weights)
    ):
        _fail(
            "fixed_routing_weights",
            weights,
            f"None or a list of num_experts={config.num_experts} finite numbers",
        )
    config.fixed_routing_weights = [float(weight) for weight in weights]


def _check_expert_names(config: MoELoraConfig) -> None:
    names: Any = config.expert_names
    if names is None:
        return
    if (
        not isinstance(names, list | tuple)
        or len(names) != config.num_experts
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) < len(names)
    ):
        _fail(
            "expert_names",
            names,
            f"None or a list of num_experts={config.num_experts} different names",
        )
    for name in names:
        if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
            _fail("expert_names", name, "plain folder names, without separators or '..'")
    config.expert_names = list(names)


def _check_stackable(config: MoELoraConfig) -> None:
    for name in _UNSTACKABLE_FIELDS:
        if getattr(config, name, None):
            raise ConfigError(
                f"{name} is not supported in a mixture of num_experts={config.num_experts} "
                f"experts, got {getattr(config, name)!r}. Use one adapter per expert (plain "
                "LoraConfig) with explicit routing_weights, or leave it unset."
            )
    if config.init_lora_weights not in _STACKABLE_INITS:
        raise ConfigError(
            f"init_lora_weights must be one of {', '.join(map(repr, _STACKABLE_INITS))} in a "
            f"mixture, got {config.init_lora_weights!r}: data-driven initialisations assume one "
            "update that is always on."
        )


def _warn_unused_routing_fields(config: MoELoraConfig) -> None:
    defaults = {f.name: f.default for f in fields(config)}
    fields_of_routing = [name for name in ROUTING_FIELDS if name != "use_moe_routing"]
    unused = [name for name in fields_of_routing if getattr(config, name) != defaults[name]]
    if unused:
        warnings.warn(
            f"{', '.join(unused)} set although use_moe_routing=False: without routing these fields "
            "have no effect.",
            stacklevel=4,
        )


def is_int(value: object) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
