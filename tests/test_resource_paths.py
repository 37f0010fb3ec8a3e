"""Places turned into paths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from graftwerk.errors import ConfigError, ResourceError
from graftwerk.resource_paths import locate


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, only looked into; beside it one whose name begins alike."""
    root = tmp_path / "site"
    for name in ("gw_sample", "gw_sample_evil"):
        (root / name / "data").mkdir(parents=True)
        (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
        (root / name / "data" / "rows.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(str(root))
    return root / "gw_sample"


def test_locate_package_file_without_importing_it(package: Path) -> None:
    assert locate("pkg://gw_sample/data/rows.csv") == package / "data" / "rows.csv"
    assert "gw_sample" not in sys.modules


def test_locate_plain_path_and_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(tmp_path / "a.csv") == tmp_path / "a.csv"
    assert locate("~/a.csv") == tmp_path / "a.csv"


def test_locate_missing_file_suggests_nearest_name(package: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        locate("pkg://gw_sample/data/row.csv")
    assert str(package / "data" / "row.csv") in caught.value.what
    assert "rows.csv" in str(caught.value.hint)


def test_locate_missing_file_lists_ten_visible_names(tmp_path: Path) -> None:
    for name in [*"abcdefghij", ".hidden"]:
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError) as caught:
        locate(tmp_path / "zzzzzz")
    assert caught.value.hint == f"{tmp_path} holds: a, b, c, d, e, f, g, h, i, j"
    (tmp_path / "k").write_text("")
    with pytest.raises(ConfigError) as caught:
        locate(tmp_path / "zzzzzz")
    assert caught.value.hint == f"{tmp_path} holds: a, b, c, d, e, f, g, h, i, j, ..."


def test_locate_missing_package_raises_with_install_command() -> None:
    with pytest.raises(ResourceError) as caught:
        locate("pkg://gw_no_such_package/x.csv")
    assert caught.value.exit_code == 5
    assert caught.value.hint == "pip install gw-no-such-package"


@pytest.mark.parametrize(
    "inner", ["../gw_sample_evil/data/rows.csv", "../../secret", "data/../../gw_sample_evil/__init__.py", "/etc/passwd"]
)
def test_locate_outside_package_raises(package: Path, inner: str) -> None:
    with pytest.raises(ConfigError, match="outside"):
        locate(f"pkg://gw_sample/{inner}")


def test_locate_link_out_of_package_raises(package: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (package / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="outside"):
        locate("pkg://gw_sample/link")


@pytest.mark.parametrize("place", ["pkg://", "pkg://../x", "pkg://a.b/c", "a\0b", "x" * 5000])
def test_locate_invalid_path_raises_config_error(place: str) -> None:
    with pytest.raises(ConfigError):
        locate(place)
