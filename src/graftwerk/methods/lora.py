"""LoRA: a frozen linear layer plus a trained product of two thin matrices.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, equation 3:

    h = W x + (alpha / r) B A x        A (r, in) Kaiming-uniform, B (out, r) zero; dropout on the low-rank path only

Options, each from its own paper:

* ``use_rslora``: scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2), so that large ranks keep
learning.
* ``use_dora``: magnitude and direction apart (see dora.py).
* ``init_lora_weights="pissa"``: A and B start as the r largest singular directions of W (Meng et al. 2024,
  arXiv:2404.02948, equations 2-4). The paper moves the rest into W; here W stays as it is and the start is subtracted:
  h = W x + s (B A - B0 A0) x, which is the same function and leaves the base untouched.
* ``loraplus_lr_ratio``: B learns faster than A by this factor (Hayou et al. 2024, arXiv:2402.12354).

Parameters: r (in + out) for each adapted layer; DoRA adds out.
Trade-off: no cost at inference once merged, and the closest to full fine-tuning of the small methods; it touches every
adapted matrix, so its training step is dearer than that of soft prompts' parameters would suggest.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.methods.base import ATTENTION_ROLES, Delta, Place, Role, base_weight, device_of
from graftwerk.methods.depth import Layered
from graftwerk.methods.dropout import dropout
from graftwerk.methods.fused import Term, fused_linear, fusible
from graftwerk.methods.paths import check_targets, linear_places, named_by, select, value_of
from graftwerk.methods.seal import Seal
from graftwerk.methods.sharing import Siblings, shared_by
from graftwerk.methods.stacked import StackedDelta, add_product, each, product, stack

READ_TOGETHER = frozenset({Role.QUERY, Role.KEY, Role.VALUE, Role.FFN_IN, Role.FFN_GATE})
"""Where several layers of one block may read the same tensor; LoRA then drops the same of its entries for all."""

Rank = Annotated[int, Field(ge=1, le=65536)]


class LoRA(Layered):
    """Settings of LoRA and its variants.

    ``target_modules``: ``"attention"`` (query, key, value and output projections), ``"all-linear"`` (every linear
    layer of the base model, heads left out), or a list of module names or suffixes (``["q_proj", "v_proj"]``).
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"
    kind: ClassVar[Literal["layer", "attention", "embedding", "weights"]] = "layer"
    mergeable: ClassVar[bool] = True
    identity_at_start: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"
    default_learning_rate: ClassVar[float] = 1e-3

    r: Rank = Field(default=8, validation_alias=AliasChoices("r", "rank"), description="rank of the update")
    lora_alpha: float = Field(
        default=16, gt=0, validation_alias=AliasChoices("lora_alpha", "alpha"), description="scale: alpha/r is applied"
    )
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("lora_dropout", "dropout"),
        description="on the low-rank path only",
    )
    target_modules: tuple[str, ...] | Literal["attention", "all-linear"] = Field(
        default="all-linear", description="attention, all-linear, or names or suffixes of linear layers"
    )
    use_rslora: bool = Field(default=False, description="scale alpha/sqrt(r) in place of alpha/r")
    use_dora: bool = Field(default=False, description="train magnitude and direction apart (DoRA)")
    init_lora_weights: bool | Literal["pissa"] = Field(
        default=True,
        description="true: B zero; pissa: the largest singular directions; false: B random, no identity at start",
    )
    loraplus_lr_ratio: float = Field(default=1.0, ge=1, description="LoRA+: learning rate of B over that of A")
    rank_pattern: dict[str, Rank] = Field(
        default_factory=dict, description="rank of modules by suffix, where it differs from r"
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="alpha of modules by suffix, where it differs"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("attention", "all-linear"):
            return (value,)
        return tuple(value) if isinstance(value, list | set) else value

    @model_validator(mode="after")
    def _fits(self) -> LoRA:
        if self.use_dora and self.init_lora_weights == "pissa":
            raise ValueError("use_dora and init_lora_weights=pissa exclude each other: both redefine the start")
        if not self.target_modules:
            raise ValueError("target_modules is empty: nothing would be adapted")
        return self

    def places(self, available: Sequence[Place]) -> list[Place]:
        linear = linear_places(available)
        if self.target_modules == "all-linear":
            chosen = linear
            if not chosen:
                raise UnsupportedError(
                    "this model has no linear layers outside its head",
                    where="method.target_modules",
                    mend="use probe, which trains the head alone, or full",
                )
        elif self.target_modules == "attention":
            chosen = [place for place in linear if place.role in ATTENTION_ROLES]
            if not chosen:
                raise UnsupportedError(
                    "which layers of this model are its attention is not known",
                    where="method.target_modules",
                    mend="use all-linear, or list the layers by name",
                )
        else:
            chosen = select(available, self.target_modules)
        chosen = self.within(chosen, available)
        if isinstance(self.target_modules, tuple):
            check_targets(chosen, self.target_modules)
        self._check_patterns(chosen)
        for place in chosen:
            if place.weight_only and self.lora_dropout:
                raise ConfigError(
                    f"there is no input to drop from in {place.path}: its weight is read, and it is never called",
                    where="method.lora_dropout",
                    mend="set lora_dropout to 0, or leave this layer out of target_modules",
                )
        return chosen

    def _check_patterns(self, chosen: Sequence[Place]) -> None:
        patterns = ("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)
        known = named_by(chosen) if any(pattern for _, pattern in patterns) else frozenset()
        for field, pattern in patterns:
            for key in pattern:
                if key not in known:
                    raise ConfigError(f"`{key}` matches none of the adapted layers", where=f"method.{field}")

    def rank(self, path: str) -> int:
        return int(value_of(self.rank_pattern, path, self.r))

    def scale(self, path: str) -> float:
        """alpha/r, or alpha/sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(path), float(value_of(self.alpha_pattern, path, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def build(self, place: Place, module: nn.Module) -> Delta:
        rank = self.rank(place.path)
        most = min(place.in_features, place.out_features)
        if self.init_lora_weights == "pissa" and rank > most:
            raise ConfigError(
                f"PiSSA takes {rank} singular directions, but {place.path} has {most}",
                where="method.r",
            )
        if self.use_dora:
            from graftwerk.methods.dora import DoRADelta

            return DoRADelta(
                place, module, rank, self.scale(place.path), self.lora_dropout, self.init_lora_weights is not False
            )
        return LoRADelta(place, module, rank, self.scale(place.path), self.lora_dropout, self.init_lora_weights)

    def assemble(self, places: Sequence[Place], modules: Sequence[nn.Module]) -> dict[str, Delta]:
        deltas = super().assemble(places, modules)
        join_siblings(places, deltas)
        return deltas

    def around(
        self, places: Sequence[Place], modules: Sequence[nn.Module], tensors: Mapping[str, Tensor], trainable: bool
    ) -> dict[str, Delta] | None:
        parts = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if self.use_dora else ()))
        if self.init_lora_weights == "pissa" or len(tensors) != len(parts) * len(places):
            return None
        deltas: dict[str, Delta] = {}
        # The values that are not of the default type are copied below, and so leave the block.
        seal = None if trainable else Seal.over(tensors.values())
        for place, module in zip(places, modules, strict=True):
            path, rank = place.path, self.rank(place.path)
            found = [tensors.get(f"{path}.{part}") for part in parts]
            shapes = [(rank, place.in_features), (place.out_features, rank), (place.out_features,)]
            if any(one is None or one.shape != shape for one, shape in zip(found, shapes, strict=False)):
                return None
            to = (device_of(module), torch.get_default_dtype())
            own = [one if seal is None else seal.view(one) for one in found if one is not None]
            parameters = [nn.Parameter(one.to(*to), trainable) for one in own]
            if self.use_dora:
                from graftwerk.methods.dora import DoRADelta

                deltas[path] = DoRADelta.holding(module, parameters, self.scale(path), self.lora_dropout)
            else:
                deltas[path] = LoRADelta.holding(module, parameters, self.scale(path), self.lora_dropout)
            deltas[path].__dict__["seal"] = seal
        join_siblings(places, deltas)
        return deltas

    def count(self, places: Iterable[Place]) -> int:
        """sum of r (in + out), and out more with DoRA."""
        return sum(
            self.rank(p.path) * (p.in_features + p.out_features) + (p.out_features if self.use_dora else 0)
            for p in places
        )

    def learning_rate_factor(self, parameter: str) -> float:
        return self.loraplus_lr_ratio if "lora_B" in parameter else 1.0


def join_siblings(places: Sequence[Place], deltas: Mapping[str, Delta]) -> None:
    """Let the deltas of one block whose layers may read one tensor drop the same of it."""
    found: dict[tuple[str, bool], Siblings] = {}
    for place in places:
        if place.role in READ_TOGETHER:
            key = place.path.rpartition(".")[0], place.role in ATTENTION_ROLES
            deltas[place.path].siblings = found.setdefault(key, Siblings())  # type: ignore[assignment]


class LoRADelta(Delta):
    """``lora_A`` (r, in) and ``lora_B`` (out, r); with PiSSA also what they started from, which does not train."""

    def __init__(
        self, place: Place, module: nn.Module, rank: int, scale: float, dropout: float, init: bool | Literal["pissa"]
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.siblings: Siblings | None = None
        self.lora_A = nn.Linear(place.in_features, rank, bias=False)  # Kaiming-uniform, as the paper's code starts it
        self.lora_B = nn.Linear(rank, place.out_features, bias=False)
        if init is True:
            nn.init.zeros_(self.lora_B.weight)
        self.pissa = init == "pissa"
        if self.pissa:
            a, b = principal(base_weight(module), rank, scale)
            with torch.no_grad():
                self.lora_A.weight.copy_(a)
                self.lora_B.weight.copy_(b)
            self.register_buffer("start_A", a)
            self.register_buffer("start_B", b)

    @classmethod
    def holding(cls, module: nn.Module, parameters: Sequence[nn.Parameter], scale: float, dropout: float) -> LoRADelta:
        """A delta of these parameters, in the mode of its base module; nothing is drawn or copied."""
        a, b = parameters
        delta = cls.__new__(cls)
        nn.Module.__init__(delta)
        training = module.training
        delta.__dict__.update(scale=scale, dropout=dropout, pissa=False, siblings=None, training=training)
        delta._modules.update(lora_A=linear_of(a, training), lora_B=linear_of(b, training))
        return delta

    def _product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        # Scaled on the thin side: r values a token in place of `out`.
        return F.linear(F.linear(x, a) * self.scale, b)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        h = x.to(a.dtype)
        if p := self._p:
            h = dropout(h, p, self._seed(x))
        update = self._product(h, a, b)
        if self.pissa:
            update = update - self._product(h, self.start_A, self.start_B)  # type: ignore[arg-type]
        return y + update.to(y.dtype)

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _seed(self, x: Tensor) -> int:
        return shared_by(x).seed(self.siblings or self, self)

    def terms(self, x: Tensor) -> list[Term]:
        """What it adds, for the fused path; the seed of a mask is drawn here."""
        p = self._p
        seed = self._seed(x) if p else 0
        terms = [Term(self.lora_A.weight, self.lora_B.weight, self.scale, p, seed)]
        if self.pissa:
            terms.append(Term(self.start_A, self.start_B, -self.scale, p, seed))  # type: ignore[arg-type]
        return terms

    def through(self, layer: nn.Module, x: Tensor, others: Sequence[Delta]) -> Tensor | None:
        deltas = [delta for delta in (self, *others) if type(delta) is LoRADelta]
        if len(deltas) <= len(others) or not fusible(layer, x):
            return None
        return fused_linear(layer, x, [term for delta in deltas for term in delta.terms(x)])

    def kin(self) -> Hashable | None:
        return None if self.dropout and self.training else "lora"  # masks are drawn delta by delta

    @property
    def breadth(self) -> int:
        return self.lora_A.weight.shape[0] * (2 if self.pissa else 1)

    @staticmethod
    def stacked(deltas: Sequence[LoRADelta]) -> StackedDelta:
        return StackedLoRA(deltas)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # One pass over the weight, in the finer of both precisions, rounded once.
        fine = torch.promote_types(weight.dtype, self.lora_A.weight.dtype)
        folded = torch.addmm(
            weight.to(fine), self.lora_B.weight.to(fine), self.lora_A.weight.to(fine), alpha=self.scale
        )
        if self.pissa:
            start_a, start_b = self.get_buffer("start_A"), self.get_buffer("start_B")
            folded.addmm_(start_b.to(fine), start_a.to(fine), alpha=-self.scale)
        return folded.to(weight.dtype), bias

    def fold_(self, weight: Tensor, bias: Tensor | None) -> None:
        a, b = self.lora_A.weight, self.lora_B.weight
        if self.pissa or a.dtype != weight.dtype:  # rounded once, not at each of two additions
            super().fold_(weight, bias)
        else:
            weight.addmm_(b, a, alpha=self.scale)


class StackedLoRA(StackedDelta):
    """A (S, r, i), scaled, and B (S, r, o); PiSSA's start is subtracted as r ranks more: [B, -B0] [A; A0]."""

    def __init__(self, deltas: Sequence[LoRADelta]) -> None:
        def a_of(delta: LoRADelta) -> Tensor:
            a = delta.lora_A.weight
            return torch.cat((a, delta.start_A)) if delta.pissa else a  # type: ignore[arg-type]

        def b_of(delta: LoRADelta) -> Tensor:
            b = delta.lora_B.weight
            return torch.cat((b, -delta.start_B), dim=1) if delta.pissa else b  # type: ignore[operator]

        a = stack(deltas, a_of)
        scales = each([delta.scale for delta in deltas], a)
        self.a = a * scales if torch.is_grad_enabled() else a.mul_(scales)
        self.b = stack(deltas, b_of).mT

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        return add_product(y, product(x.to(self.a.dtype), self.a), self.b)


def linear_of(weight: nn.Parameter, training: bool) -> nn.Linear:
    """A linear layer without bias around a weight (out, in): `nn.Linear` would draw one first, which takes longer than
    reading the weight from disk.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.__dict__.update(in_features=weight.shape[1], out_features=weight.shape[0], training=training)
    linear._parameters.update(weight=weight, bias=None)
    return linear


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA's start: A (r, in) and B (out, r) with ``scale`` B A the best rank-r approximation of ``weight`` (out,
    in).
    """
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    root = torch.sqrt(s[:rank] / scale)
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
