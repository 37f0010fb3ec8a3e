"""Contents of an adapter folder without its weights, read as untrusted files, and the check of its checksums."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwerk.errors import AdapterError, IntegrityError, ResourceError, UnsupportedError
from graftwerk.methods.base import Method
from graftwerk.methods.registry import METHODS, parse_method
from graftwerk.serialization.adapter_config import CONFIG_FILE, OWN_PREFIX, read_config
from graftwerk.serialization.atomic import read_steadily, recover
from graftwerk.serialization.untrusted_files import checksum, read_sealed, refuse_changed

WEIGHTS_FILE = "adapter_model.safetensors"
TRAINING_FILE = "graftwerk_training.safetensors"
OWN_FILE = "graftwerk.json"
CARD_FILE = "README.md"
FORMAT = 1


@dataclass(frozen=True)
class AdapterInfo:
    """Contents of an adapter folder, checked as untrusted files; no weights are read.

    Attributes:
        folder: The folder.
        config: Contents of `adapter_config.json`.
        own: Contents of `graftwerk.json`; empty for folders of PEFT.
    """

    folder: Path
    config: dict[str, Any]
    own: dict[str, Any]

    @property
    def peft_type(self) -> str:
        """Return the adapter's type in PEFT's names, such as `LORA`."""
        return str(self.config["peft_type"])

    @property
    def name(self) -> str | None:
        """Return the name that the adapter had in training, or None if it is not stored."""
        name = self.own.get("name")
        return name if isinstance(name, str) else None

    @property
    def base_name(self) -> str | None:
        """Return the name of the base in training, perhaps a path on another machine, or None if it is not stored."""
        name = self.own["base"].get("name") if self.own else self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def base_fingerprint(self) -> str | None:
        """Return the fingerprint of the base's weights, or None if it is not stored."""
        return self.own["base"].get("fingerprint") if self.own else None

    @property
    def digests_beside(self) -> dict[str, str]:
        """Return digests, by name, of base weights that neither the fingerprint covers nor the adapter stores."""
        beside: dict[str, str] = self.own["base"].get("beside", {}) if self.own else {}
        return beside

    def written(self, name: str) -> dict[str, int] | None:
        """Return ``bytes`` and ``crc32`` of a file as it was written, or None if they are not stored."""
        files: dict[str, dict[str, int]] = self.own.get("files", {})
        return files.get(name)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """Return how the base was quantized, as `own_facts` writes it, or None if it was not."""
        said: dict[str, Any] | None = self.own.get("base", {}).get("quantization")
        return said

    @property
    def labels(self) -> list[str] | None:
        """Return the names of the classes, in the order of the head's outputs, or None if they are not stored."""
        labels: list[str] | None = self.own.get("labels")
        return labels

    @property
    def method(self) -> Method | None:
        """Return the method's settings, or None for folders of PEFT, whose settings depend on the model too.

        Raises:
            ConfigError: A setting is not known in this version.
        """
        return parse_method(self.own["method"]) if self.own else None


def read_adapter_config(folder: Path | str) -> AdapterInfo:
    """Read an adapter folder without its weights.

    Raises:
        ResourceError: There is no such folder, or a file of it is missing.
        IntegrityError, ConfigError, UnsupportedError: As for `adapter_config.read_config`.
        AdapterError: The folder holds no adapter; the message names adapters in folders below it.
    """
    return read_steadily(folder, lambda: _read(recover(Path(folder))))


def _read(folder: Path) -> AdapterInfo:
    if not folder.is_dir():
        raise ResourceError(f"there is no folder {folder}", where=str(folder), hint="check the path")
    if not (folder / CONFIG_FILE).exists():
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
        raise AdapterError(
            f"{folder} holds no adapter: it has no {CONFIG_FILE}",
            where=str(folder),
            hint=f"there are adapters below it: {', '.join(below[:20])}" if below else "name an adapter's folder",
        )
    config = read_config(folder)
    own = _checked_own(read_sealed(folder / OWN_FILE), folder / OWN_FILE) if (folder / OWN_FILE).exists() else {}
    if not own and str(config["peft_type"]).startswith(OWN_PREFIX):
        raise AdapterError(
            f"{config['peft_type']} is a type of graftwerk's, whose settings stand in {OWN_FILE}, and that is missing",
            where=str(folder),
        )
    return AdapterInfo(folder, config, own)


def _checked_own(own: dict[str, Any], path: Path) -> dict[str, Any]:
    if own.get("format") != FORMAT:
        raise UnsupportedError(
            f"{path.name} has format {own.get('format')!a:.20}; this version reads format {FORMAT}",
            where=str(path),
            hint="update graftwerk",
        )
    check_said(own, path)
    files = own.get("files")
    good = (
        isinstance(own.get("base"), dict)
        and all(
            isinstance(own["base"].get(key), str | None)
            for key in ("name", "architecture", "model_type", "fingerprint")
        )
        and isinstance(own["base"].get("beside", {}), dict)
        and _says_quantization(own["base"].get("quantization"))
        and isinstance(own.get("method"), dict)
        and isinstance(own["method"].get("name"), str)
        and own["method"]["name"] in METHODS
        and isinstance(files, dict)
        and {CONFIG_FILE, WEIGHTS_FILE} <= files.keys() <= {CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE}
        and all(
            isinstance(known, dict)
            and known.keys() == {"bytes", "crc32"}
            and all(type(number) is int for number in known.values())
            for known in files.values()
        )
    )
    if not good:
        raise IntegrityError(f"{path.name} does not say what it should", where=str(path), hint="save the adapter again")
    return own


def _says_quantization(said: Any) -> bool:
    """Return True if what a folder says of its base's quantization is nothing, or what `own_facts` writes."""
    return said is None or (
        isinstance(said, dict)
        and all(isinstance(said.get(key), str) for key in ("name", "compute_type", "codes"))
        and isinstance(said.get("double_quant"), bool | None)
        and isinstance(said.get("skip"), list)
        and all(isinstance(path, str) for path in said["skip"])
    )


def check_said(values: Mapping[str, Any], path: Path) -> None:
    """Check the types of what `graftwerk.json` and the manifest of a run both say of how an adapter is used.

    Raises:
        IntegrityError: a value is not what its key calls for; the key is named.
    """
    data = values.get("data")
    told = data if isinstance(data, dict) else {}
    origin = told.get("origin")
    columns = origin.get("columns") if isinstance(origin, dict) else None
    length, metrics, compute = values.get("max_length"), values.get("metrics"), values.get("compute")
    said = {
        "compute": compute is None
        or (
            isinstance(compute, dict)
            and all(isinstance(compute.get(key), str) for key in ("type", "device"))
            and isinstance(compute.get("model_dtype"), str | None)
        ),
        "labels": _none_or_texts(values.get("labels")),
        "max_length": length is None or (type(length) is int and 1 <= length < 2**31),
        "task": isinstance(values.get("task"), str | None),
        "task_settings": isinstance(values.get("task_settings"), dict | None),
        "data": isinstance(data, dict | None),
        "data.fingerprint": isinstance(told.get("fingerprint"), str | None),
        "data.origin": isinstance(origin, dict | None),
        "data.origin.columns": columns is None
        or (isinstance(columns, dict) and all(isinstance(name, str) for name in columns.values())),
        **{key: isinstance(values.get(key), dict | None) for key in ("metrics", "cost", "parameters", "versions")},
        "metrics of a split": not isinstance(metrics, dict)
        or all(type(of) is dict and all(type(figure) is dict for figure in of.values()) for of in metrics.values()),
    }
    if wrong := [key for key, good in said.items() if not good]:
        raise IntegrityError(
            f"{path.name} does not say what it should: `{wrong[0]}` has a wrong type",
            where=str(path),
            hint="take it from a copy, or train again",
        )


def _none_or_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def check_files(info: AdapterInfo, *, but: Collection[str] = ()) -> None:
    """Compare the files of one of our folders with what `graftwerk.json` says of them.

    Args:
        info: Contents of the folder.
        but: Files whose bytes are compared when they are read, and are only looked for here.

    Raises:
        AdapterError: a file is missing.
        IntegrityError: a file is not the one that was written.
    """
    for name, known in info.own["files"].items():
        path = info.folder / name
        if not path.is_file():
            raise AdapterError(f"missing: {name}", where=str(info.folder))
        if path.stat().st_size != known["bytes"] or (name not in but and checksum(path) != known):
            refuse_changed(path)
