"""Compiles what runs for every batch, with mypyc, when a wheel is built with HATCH_BUILD_HOOKS_ENABLE=1.

The modules are plain Python and run as such wherever nothing was compiled; pyproject.toml lists them. Needs a C
compiler and Python's headers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Of the packages that are not ours only these give types: the same is compiled whatever else is installed where a wheel
# is built. Not strict, for that takes more types.
TYPED = ("numpy", "msgspec")
MYPY = f"""[mypy]
mypy_path = {{path}}
cache_dir = {{cache}}
no_site_packages = True
ignore_missing_imports = True
explicit_package_bases = True
[mypy-{",".join(f"{name}.*" for name in TYPED)}]
ignore_errors = True
"""


class CompiledModules(BuildHookInterface):  # type: ignore[type-arg]  # its configuration is a mapping of anything
    """Puts an extension module beside each of the listed modules into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the sources themselves are what is installed: a change there must count."""
        if version == "editable":
            return
        if lacking := missing():
            sys.exit(f"hatch_build.py: {lacking}")
        self._folder = tempfile.TemporaryDirectory()  # goes when the process ends, if nothing else removes it
        built = compiled(Path(self.root), self.config["roots"], self.config["modules"], Path(self._folder.name))
        build_data["force_include"] |= {str(file): name for name, file in built.items()}
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove what the wheel has a copy of."""
        if version != "editable":
            self._folder.cleanup()


def missing() -> str | None:
    """What compiling lacks here, and how to install it; None where it can be done."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    lacking = [] if shutil.which(compiler) else [f"a C compiler ({compiler})"]
    lacking += [] if header.exists() else [str(header)]
    if not lacking:
        return None
    return f"compiling needs {' and '.join(lacking)}: on Debian, apt-get install gcc python3-dev"


def compiled(root: Path, roots: list[str], modules: list[str], folder: Path) -> dict[str, Path]:
    """Compile modules that lie below these roots; extension modules below `folder`, by their places in a wheel.

    Raises SystemExit where mypy finds errors, setuptools' CompileError where the C compiler does; both were printed.
    """
    from mypyc.build import mypycify
    from setuptools import Distribution

    # A package's modules share a library, which lies in the package: images have some of the packages.
    packages: dict[str, list[str]] = {}
    for module in modules:
        packages.setdefault(module.partition(".")[0], []).append(str(_source(root, roots, module)))
    typed = folder / "typed"
    typed.mkdir()
    for name in TYPED:
        (typed / name).symlink_to(Path(str(import_module(name).__file__)).parent)
    settings = folder / "mypy.ini"
    path = ":".join(str(one) for one in (*(root / one for one in roots), typed))
    settings.write_text(MYPY.format(path=path, cache=folder / "mypy"))
    extensions = mypycify(
        [f"--config-file={settings}", *(source for sources in packages.values() for source in sources)],
        separate=[(sources, f"{package}.compiled") for package, sources in packages.items()],
        opt_level="3",
        debug_level="0",
        target_dir=str(folder / "c"),
    )
    build = Distribution({"name": "compiled", "ext_modules": extensions}).get_command_obj("build_ext")
    build.build_lib, build.build_temp = str(folder / "lib"), str(folder / "temp")
    build.parallel = os.cpu_count()
    build.ensure_finalized()
    build.run()
    return {str(file.relative_to(folder / "lib")): file for file in (folder / "lib").rglob("*.so")}


def _source(root: Path, roots: list[str], module: str) -> Path:
    found = [path for one in roots if (path := root / one / (module.replace(".", "/") + ".py")).exists()]
    if not found:
        sys.exit(f"hatch_build.py: {module} is listed in pyproject.toml and is not there")
    return found[0]
