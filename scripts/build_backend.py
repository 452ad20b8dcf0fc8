"""The PEP 517 build backend: scikit-build-core, told which torch to build against.

An isolated build has an environment of its own. Asking for torch there would download a second
one, of several GB and perhaps of another version than the user's. So the torch in the environment
that pip installs into is used where there is one, and a build-time torch is asked for only where
there is none. The interpreter's `sysconfig` names that environment even in pip's isolated build. In
that of `python -m build` it does not, but the environment that is active has its variable still.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def _installed_torch() -> Path | None:
    """The folder of the torch package that the build should use, if one is installed."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for folder in [*_site_folders(), *_active_site_folders()]:
        candidate = Path(folder) / "torch"
        if (candidate / "version.py").is_file():
            return candidate
    return None


def _site_folders() -> list[str]:
    """Where the interpreter finds packages when no isolated build is in the way."""
    own = [sysconfig.get_path(key) for key in ("platlib", "purelib")]
    if sys.prefix != sys.base_prefix:
        settings = Path(sys.prefix, "pyvenv.cfg").read_text(encoding="utf-8").lower()
        if not re.search(r"^include-system-site-packages\s*=\s*true", settings, re.MULTILINE):
            return own
    return [*own, site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]


def _active_site_folders() -> list[Path]:
    """The folders of the activated environment; of which Python does not matter for the build."""
    prefixes = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    return [
        folder
        for prefix in prefixes
        if prefix
        for folder in sorted(Path(prefix).glob("lib/python3*/site-packages"))
    ]


def _with_torch(config_settings: Settings) -> Settings:
    settings = dict(config_settings or {})
    torch = _installed_torch()
    if torch is not None:
        settings.setdefault("cmake.define.EMBER_TORCH_DIR", str(torch))
    return settings


def _requirements(requirements: list[str]) -> list[str]:
    return requirements if _installed_torch() else [*requirements, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requirements(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requirements(_backend.get_requires_for_build_editable(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _backend.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return _backend.build_editable(
        wheel_directory, _with_torch(config_settings), metadata_directory
    )
