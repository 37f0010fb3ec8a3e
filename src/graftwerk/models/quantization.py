"""Settings of a quantized base: `quantization: nf4` or `int8` in a run file."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from graftwerk.errors import ResourceError
from graftwerk.settings import Settings

ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)]


class Quantization(Settings):
    """Settings of bitsandbytes for the weights of the base's linear layers; adapters train on them in full precision.

    Heads, embeddings, norms, the scores of the vocabulary and modules that a method saves whole are never quantized.

    Example:
        >>> Quantization.model_validate("nf4").double_quant
        True
        >>> Quantization(name="int8", skip=("lm_head",)).to_dict()
        {'name': 'int8', 'double_quant': None, 'compute_type': 'auto', 'skip': ['lm_head']}
    """

    name: Literal["nf4", "int8"] = Field(
        description="nf4: QLoRA's 4-bit NormalFloat, one scale for 64 weights. int8: 8 bits, one scale for each row"
    )
    double_quant: bool | None = Field(
        default=None,
        description="store the scales of nf4 in 8 bits as well. null: yes for nf4; int8 has no such scales",
    )
    compute_type: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type that layers in nf4 are multiplied in. auto: the compute type of the run"
    )
    skip: tuple[ModuleName, ...] = Field(
        default=(), description="modules whose linear layers stay as they are, by path or a part of it: lm_head"
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _resolved(self) -> Self:
        """Refuse what would do nothing, and write out the default of nf4."""
        if self.name == "nf4" and self.double_quant is None:
            object.__setattr__(self, "double_quant", True)  # frozen for everybody else
        if self.name == "int8" and self.double_quant is not None:
            raise ValueError("`double_quant` is for nf4: int8 has one scale for each row, and leaves it as it is")
        if self.name == "int8" and self.compute_type != "auto":
            raise ValueError("`compute_type` is for nf4: int8 is multiplied in the type of its input")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return self.model_dump(mode="json")


def require_bitsandbytes() -> str:
    """Return the version of bitsandbytes.

    Raises:
        ResourceError: It is not installed; the hint names the extra.
    """
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        raise ResourceError(
            "a quantized base needs the package bitsandbytes",
            where="quantization",
            hint="pip install 'graftwerk[quantized]'; or leave `quantization` out",
        ) from None


def import_bitsandbytes() -> None:
    """Import bitsandbytes, without its note to every user about a kernel that few can have.

    Raises:
        ResourceError: It is not installed.
    """
    require_bitsandbytes()
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(before)
