"""Files out of packages on the user's own package index, which are read and never executed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

PIP_SECONDS = 120.0


class SourceError(Exception):
    """A source cannot deliver; the text says why in one line."""


@dataclass(frozen=True)
class Package:
    """One file of a package index.

    Attributes:
        name: of the package.
        version: of the package.
        sha256: of the file.
        file: its name.
    """

    name: str
    version: str
    sha256: str
    file: str

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel and not a source package."""
        return self.file.endswith(".whl")


def download_package(package: Package, folder: Path) -> Path:
    """Let pip fetch a package, so that the user's index, proxy and certificates apply.

    pip asks a source package for its metadata by running its build backend. A stand-in backend
    answers instead, so that no line of the package is executed. A wheel needs none.

    Args:
        package: which one.
        folder: where to put it.

    Returns:
        The file, which has the checksum of `package`.

    Raises:
        SourceError: pip cannot deliver it, or it is another file.
    """
    title = f"{package.name} {package.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = "--only-binary" if package.is_wheel else "--no-binary"
    with nullcontext() if package.is_wheel else _inert_setuptools(package) as stand_in:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--retries", "1", "--no-input", "--no-deps", kind, package.name),
            # Nothing is installed, so it does not matter which Pythons the package is made for.
            *("--ignore-requires-python", "--require-hashes"),
            *(() if package.is_wheel else ("--use-pep517", "--no-build-isolation")),
            *("--requirement", str(requirements), "--dest", str(folder)),
        ]
        environment = {**os.environ, **({"PYTHONPATH": str(stand_in)} if stand_in else {})}
        try:
            result = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PIP_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise SourceError(f"pip took more than {PIP_SECONDS:.0f} s") from None
    if result.returncode != 0:
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise SourceError(f"{title} has an unexpected checksum")
        lines = result.stderr.splitlines()
        telling = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        reason = telling[-1].removeprefix("ERROR: ")
        raise SourceError(f"pip cannot fetch {title}: {reason}")
    return folder / package.file


@contextmanager
def _inert_setuptools(package: Package) -> Iterator[Path]:
    """A folder whose `setuptools.build_meta` answers pip's request for metadata, and no other."""
    name, version = package.name, package.version
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder, "setuptools")
        stand_in.mkdir()
        (stand_in / "__init__.py").touch()
        (stand_in / "build_meta.py").write_text(
            "import pathlib, types\n"
            "def metadata(folder, config_settings=None):\n"
            f"    name = '{name}-{version}.dist-info'\n"
            "    path = pathlib.Path(folder, name)\n"
            "    path.mkdir()\n"
            "    path.joinpath('METADATA').write_text(\n"
            f"        'Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n')\n"
            "    return name\n"
            "__legacy__ = types.SimpleNamespace(prepare_metadata_for_build_wheel=metadata)\n"
        )
        yield Path(folder)
