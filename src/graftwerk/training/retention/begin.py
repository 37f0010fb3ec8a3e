"""The strategies of a run, added to its training."""

from __future__ import annotations

from graftwerk.config import RunConfig
from graftwerk.errors import ConfigError, UnsupportedError
from graftwerk.training.retained import RetainedMeter
from graftwerk.training.retention.base import KEY, Setting
from graftwerk.training.retention.retention import Retention
from graftwerk.training.setup import Prepared
from graftwerk.training.trainer import Trainer


def retention_of(
    settings: RunConfig, prepared: Prepared, trainer: Trainer, meter: RetainedMeter, kind: type[Setting] = Setting
) -> Retention | None:
    """Add the strategies of a run to its training, and return them, or None if it has none.

    Raises:
        UnsupportedError: Parts of the weights are on other processes.
        ConfigError: As `Strategy.start`; or nothing is trained that tasks share.
    """
    if settings.training.retain is None:
        return None
    if trainer.distributed.shards:
        raise UnsupportedError(
            "strategies against forgetting need the whole model in each process", where=KEY, hint="leave it out"
        )
    if all(trainer.adapter.is_head(key) for key, _ in trainer.adapter.named_parameters()):
        raise ConfigError(
            f"{trainer.adapter.method.title} trains heads alone, so that nothing of other tasks can be forgotten",
            where=KEY,
            hint="leave it out",
        )
    retention = Retention(
        settings.training.retain,
        kind(
            meter, trainer.adapter, prepared.task, prepared.tokenizer, trainer.distributed, trainer.train,
            settings.training.seed, settings.training.warm_start is not None,
        ),
    )  # fmt: skip
    trainer.retain(retention)
    return retention
