"""Router modules: they own parameters and turn hidden states into router logits."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moelora import router_rows as rows
from moelora.config import is_int, is_number
from moelora.distributed import whole
from moelora.errors import ConfigError, RoutingWeightsError
from moelora.routing import Routing, share_while_immature, top_k_routing

#: Router rows start small and random: with equal rows every token would go to the first experts.
ROUTER_INIT_STD = 0.02


class ModuleRouter(nn.Module):
    """The router of one adapted layer, reading the layer's own input.

    ``logits = x @ weight.T``, or ``silu(x @ hidden_weight.T) @ weight.T`` with a hidden layer. Its
    parameters lie directly in it, not in submodules, so that PEFT's state-dict functions find them
    as ``<layer>.lora_router.<adapter>.<name>``.

    Args:
        in_features: width of what the layer's ``lora_A`` reads.
        num_experts: experts to choose from.
        hidden_size: width of the hidden layer, or None.
        track_maturity: keep the buffer ``mature`` (all True at first).
        reads_indices: the layer is an embedding; the input is token ids, each a one-hot vector.
        expert_dropout: the probability with which a chosen expert is left out in training. Kept in
            an ``nn.Dropout``, which is what trainers that want no randomness look for.
    """

    weight: nn.Parameter
    hidden_weight: nn.Parameter | None
    mature: Tensor | None

    def __init__(
        self,
        *,
        in_features: int,
        num_experts: int,
        hidden_size: int | None = None,
        track_maturity: bool = False,
        reads_indices: bool = False,
        expert_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.reads_indices = reads_indices
        if expert_dropout > 0:
            self.expert_dropout = nn.Dropout(expert_dropout)
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size or in_features))
        hidden = (
            None if hidden_size is None else nn.Parameter(torch.zeros(hidden_size, in_features))
        )
        self.register_parameter("hidden_weight", hidden)
        mature = torch.ones(num_experts, dtype=torch.bool) if track_maturity else None
        self.register_buffer("mature", mature)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """The number of experts this router chooses from."""
        return self.weight.shape[0]

    @property
    def dropped_share(self) -> float:
        """With what probability a chosen expert is left out now; 0 outside of training."""
        dropout = self._modules.get("expert_dropout")
        if not isinstance(dropout, nn.Dropout) or not dropout.training:
            return 0.0
        return float(dropout.p)

    def reset_parameters(self) -> None:
        """Draw all rows anew from a normal distribution."""
        nn.init.normal_(self.weight, std=ROUTER_INIT_STD)
        if self.hidden_weight is not None:
            # variance is kept through the hidden layer, as nn.Linear does
            nn.init.kaiming_uniform_(self.hidden_weight, a=5**0.5)

    def forward(self, hidden_states: Tensor) -> Float[Tensor, "*batch experts"]:
        """Return the router logits, at least float32, also under autocast.

        Args:
            hidden_states: ``(..., in_features)`` floats, or ``(...)`` token ids for an embedding.

        Raises:
            RoutingWeightsError: if the hidden states are of another width.
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            weight = whole(self.weight)
            first = weight if self.hidden_weight is None else whole(self.hidden_weight)
            if not self.reads_indices and hidden_states.shape[-1] != first.shape[-1]:
                raise RoutingWeightsError(
                    f"The router reads hidden states of width {first.shape[-1]}, got "
                    f"{hidden_states.shape[-1]}: not all of this model's are as wide as its config "
                    "says. Use router_scope='module'."
                )
            if self.reads_indices:
                scores = F.embedding(hidden_states, first.t().to(dtype))
            else:
                dtype = torch.promote_types(dtype, hidden_states.dtype)
                scores = F.linear(hidden_states.to(dtype), first.to(dtype))
            if self.hidden_weight is None:
                return scores
            return F.linear(F.silu(scores), weight.to(dtype))

    def extra_repr(self) -> str:
        """Name the sizes in ``repr(model)``."""
        hidden = (
            "" if self.hidden_weight is None else f", hidden_size={self.hidden_weight.shape[0]}"
        )
        return f"num_experts={self.num_experts}{hidden}"


class Router(ModuleRouter):
    """A router over the experts of a whole model, for ``attach_router``.

    Reads hidden states and returns routing weights: softmax of ``logits / temperature``, the top k
    kept and renormalised (:func:`~moelora.routing.top_k_routing`), or dense while any expert is
    immature.

    It grows: :meth:`expand` adds rows, :meth:`shrink` takes rows away, :meth:`freeze` keeps rows
    from being trained. Rows that are added or frozen apart from others lie in parameters of their
    own (``weight``, ``weight_1``, ...), so optimisers need not be trusted to leave them alone, and
    each expert's logit is a product of its own, so that no bit of it depends on the other experts.

    Args:
        input_size: width of the hidden states.
        num_experts: experts to choose from.
        top_k: experts per token.
        temperature: divides the logits, > 0.
        hidden_size: width of a hidden layer, or None.
        track_maturity: keep the buffer ``mature``.
        growing: ``top_k`` may be more than ``num_experts``, and counts as all of them until there
            are as many.
        row_blocks: how many rows each parameter holds; None for one parameter.

    Raises:
        ConfigError: if a size is no positive integer, ``top_k`` not in ``[1, num_experts]``, the
            temperature not finite and positive, or ``row_blocks`` do not make ``num_experts``.

    Example:
        >>> Router(16, 4)(torch.zeros(2, 3, 16)).shape
        torch.Size([2, 3, 4])
    """

    #: The parameters that have one row per expert.
    row_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        temperature: float = 2.0,
        hidden_size: int | None = None,
        track_maturity: bool = False,
        growing: bool = False,
        row_blocks: list[int] | None = None,
    ) -> None:
        sizes = {"input_size": input_size, "num_experts": num_experts, "top_k": top_k}
        if hidden_size is not None:
            sizes["hidden_size"] = hidden_size
        for name, value in sizes.items():
            if not is_int(value):
                raise ConfigError(f"{name} must be an integer, got {value!r}.")
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if not isinstance(growing, bool):
            raise ConfigError(f"growing must be True or False, got {growing!r}.")
        if top_k > num_experts and not growing:
            raise ConfigError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k}."
            )
        if not is_number(temperature):
            raise ConfigError(f"temperature must be a finite number, got {temperature!r}.")
        if temperature <= 0:
            raise ConfigError(f"temperature must be > 0, got {temperature}.")
        super().__init__(
            in_features=input_size,
            num_experts=num_experts,
            hidden_size=hidden_size,
            track_maturity=track_maturity,
        )
        self.input_size = input_size
        self.top_k = top_k
        self.temperature = temperature
        self.growing = growing
        self._cut_rows(row_blocks)

    def _cut_rows(self, row_blocks: Any) -> None:
        """Lay fresh rows into parameters of these sizes."""
        if row_blocks is None:
            return
        if not isinstance(row_blocks, list) or not all(is_int(n) and n > 0 for n in row_blocks):
            raise ConfigError(
                f"row_blocks must be a list of positive integers, got {row_blocks!r}."
            )
        if sum(row_blocks) != self.num_experts:
            raise ConfigError(
                f"row_blocks must make num_experts={self.num_experts} rows, got {row_blocks}."
            )
        rows.cut(self, row_blocks)

    @property
    def num_experts(self) -> int:
        """The number of experts this router chooses from."""
        return sum(self.row_blocks)

    @property
    def row_blocks(self) -> list[int]:
        """How many rows each parameter holds, in order."""
        return [block.shape[0] for block in rows.blocks(self, "weight")]

    def reset_parameters(self) -> None:
        """Draw all rows anew from a normal distribution."""
        super().reset_parameters()
        for block in rows.blocks(self, "weight")[1:]:
            nn.init.normal_(block, std=ROUTER_INIT_STD)

    def config(self) -> dict[str, Any]:
        """The arguments that make such a router again."""
        config: dict[str, Any] = {
            "input_size": self.input_size,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "hidden_size": None if self.hidden_weight is None else self.hidden_weight.shape[0],
            "track_maturity": self.mature is not None,
        }
        # left out where they say nothing, so that earlier releases read the file
        if self.growing:
            config["growing"] = True
        if len(self.row_blocks) > 1:
            config["row_blocks"] = self.row_blocks
        return config

    # Growing ---------------------------------------------------------------------------------

    def expand(self, number: int = 1, *, mature: bool = False) -> None:
        """Add rows for new experts, after the others, whose rows and logits stay as they are.

        Args:
            number: how many.
            mature: whether they count as mature, if maturity is tracked.

        Raises:
            ConfigError: if ``number`` is no positive integer.
        """
        if not is_int(number) or number < 1:
            raise ConfigError(f"number must be an integer of at least 1, got {number!r}.")
        rows.append(self, number, std=ROUTER_INIT_STD)
        if self.mature is not None:
            self.mature = torch.cat([self.mature, self.mature.new_full((number,), mature)])

    def shrink(self, experts: Iterable[int]) -> None:
        """Take the rows of experts away; the rows and logits of the others stay as they are.

        Args:
            experts: their columns.

        Raises:
            ConfigError: if a column does not exist, none would be left, or fewer than ``top_k`` and
                the router is not ``growing``.
        """
        gone = set(self._columns(experts))
        kept = [column for column in range(self.num_experts) if column not in gone]
        least = 1 if self.growing else self.top_k
        if len(kept) < least:
            raise ConfigError(
                f"At least {least} of {self.num_experts} experts must stay, but {len(gone)} were "
                "to be taken away."
            )
        if self.mature is not None:
            self.mature = self.mature[kept]
        rows.keep(self, kept)

    def freeze(self, experts: Iterable[int] | None = None) -> None:
        """Freeze rows: they get no gradient, so no optimiser moves a bit of them.

        A hidden layer is frozen too, since frozen rows read it.

        Args:
            experts: their columns; None for all.

        Raises:
            ConfigError: if a column does not exist.
        """
        columns = self._columns(experts)
        rows.set_trainable(self, columns, trainable=False)
        if columns and self.hidden_weight is not None:
            self.hidden_weight.requires_grad_(False)
            self.hidden_weight.grad = None

    def unfreeze(self, experts: Iterable[int] | None = None) -> None:
        """Let rows be trained again; the hidden layer when no row is frozen.

        Args:
            experts: their columns; None for all.

        Raises:
            ConfigError: if a column does not exist.
        """
        rows.set_trainable(self, self._columns(experts), trainable=True)
        if self.hidden_weight is not None:
            self.hidden_weight.requires_grad_(not any(map(self.is_frozen, range(self.num_experts))))

    def is_frozen(self, expert: int) -> bool:
        """Whether a row is frozen.

        Raises:
            ConfigError: if the column does not exist.
        """
        (column,) = self._columns([expert])
        return not rows.block_of_row(self, column).requires_grad

    def mark_mature(self, experts: Iterable[int] | None = None, *, mature: bool = True) -> None:
        """Mark experts as mature, or young again.

        Args:
            experts: their columns; None for all.
            mature: False to make them young.

        Raises:
            ConfigError: if a column does not exist, or the router does not track maturity.
        """
        columns = self._columns(experts)
        if self.mature is None:
            raise ConfigError(
                "This router does not track maturity. Make it with track_maturity=True."
            )
        with torch.no_grad():
            self.mature[columns] = mature

    def is_mature(self, expert: int) -> bool:
        """Whether an expert is mature; without ``track_maturity`` all are.

        Raises:
            ConfigError: if the column does not exist.
        """
        (column,) = self._columns([expert])
        return self.mature is None or bool(self.mature[column])

    def _columns(self, experts: Iterable[int] | None) -> list[int]:
        number = self.num_experts
        columns = list(range(number)) if experts is None else list(experts)
        for column in columns:
            if not is_int(column) or not 0 <= column < number:
                raise ConfigError(f"An expert's column must be in [0, {number}), got {column!r}.")
        return columns

    # Deciding --------------------------------------------------------------------------------

    def logits(self, hidden_states: Float[Tensor, "*batch features"]) -> Float[Tensor, "tokens e"]:
        """Raw scores of the flattened tokens, at least float32; each expert's on its own.

        Raises:
            RoutingWeightsError: if the hidden states are of another width than ``input_size``.
        """
        if hidden_states.shape[-1] != self.input_size:
            raise RoutingWeightsError(
                f"The {type(self).__name__} reads hidden states of width input_size="
                f"{self.input_size}, got {hidden_states.shape[-1]}."
            )
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            dtype = torch.promote_types(dtype, hidden_states.dtype)
            inputs = hidden_states.reshape(-1, self.input_size).to(dtype)
            if self.hidden_weight is not None:
                inputs = F.silu(F.linear(inputs, self.hidden_weight.to(dtype)))
            weight = self.stacked("weight").to(dtype)
            # one product for all would be rounded differently for another number of rows
            return torch.cat([F.linear(inputs, row) for row in weight.split(1)], dim=-1)

    def stacked(self, name: str) -> Tensor:
        """All rows of one of ``row_parameters``, in the order of the experts."""
        blocks: Sequence[Tensor] = rows.blocks(self, name)
        return blocks[0] if len(blocks) == 1 else torch.cat(tuple(blocks))

    def routing(self, hidden_states: Float[Tensor, "*batch features"]) -> Routing:
        """The whole decision for the flattened tokens.

        Raises:
            RoutingWeightsError: if the hidden states are of another width than ``input_size``.
        """
        logits = self.logits(hidden_states) / self.temperature
        routing = top_k_routing(logits, top_k=min(self.top_k, self.num_experts))
        return routing if self.mature is None else share_while_immature(routing, self.mature)

    def forward(
        self, hidden_states: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*batch experts"]:
        """Return the routing weights, at least float32."""
        weights = self.routing(hidden_states).routing_weights
        return weights.reshape(*hidden_states.shape[:-1], self.num_experts)

    # State dicts -----------------------------------------------------------------------------

    def fitted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a router of as many experts, cut as this one's rows are.

        Args:
            tensors: by name, as in a router's ``state_dict``.

        Returns:
            The tensors as they are, if they cannot be for this router.
        """
        return rows.fitted(self, tensors)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        fitted = self.fitted(own)
        for key in own.keys() - fitted.keys():
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in fitted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
