"""Fills the virtual environment of an image: `install.py requirements FOLDER`, `packages TARGET` and `code FOLDER`.

Runs in the build stages of the Dockerfile, with the base's Python and its pip; `compiler` installs what `code` takes to
compile our modules. The packages are those of our extras at the versions of constraints.txt; what no process of ours
reads is removed, and the rest gets its byte-code, so that equal sources give equal files (the images' root file systems
are read-only: nobody could do it later).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ENVIRONMENT = Path("/opt/ensemble")
PYTHON = ENVIRONMENT / "bin/python"
CODE = ENVIRONMENT / "code"
# What each image has of our distribution; all have its metadata.
EXTRAS = {"operator": ("operator",), "gateway": ("gateway",), "worker": ("worker", "onnx", "storage")}
OURS = {target: ("ensemble_contract", f"ensemble_{target}") for target in ("operator", "gateway", "worker")}

# Folders, below site-packages, that nothing of ours reads: what developers want, and calls of the Kubernetes clients
# that are loaded on demand (the operator sends plain mappings, and demands none).
UNUSED = ("torch/include", "torch/share", "torch/test", "kubernetes/client/api", "kubernetes/aio/client/api")
# Of torch's programs only this is looked for, when it is imported.
PROGRAMS, PROGRAM = "torch/bin", "torch_shm_manager"
UNUSED_FOLDERS = ("tests",)
UNUSED_SUFFIXES = (".pyi", ".pxd", ".pyx", ".a", ".h", ".hpp", ".cuh", ".c", ".cpp")
RARELY_IMPORTED = r"/(kubernetes/(aio/)?client/models/[^_]|torch/testing/)"


def main(arguments: list[str]) -> int:
    """Do what is asked; the exit code."""
    match arguments:
        case ["requirements", folder]:
            requirements(Path(folder))
        case ["packages", target] if target in OURS:
            packages(target)
        case ["compiler"]:
            compiler()
        case ["code", folder]:
            code(Path(folder))
        case _:
            sys.stderr.write(f"{__doc__}\n")
            return 2
    return 0


def requirements(folder: Path) -> None:
    """Write TARGET.txt for each image: what pyproject.toml lists for every process and for the image's extras.

    And build.txt, what building our wheel takes. They are files of their own, so that no other change of pyproject.toml
    makes a layer of packages anew.
    """
    pyproject = tomllib.loads(Path("pyproject.toml").read_text())
    project, wheel = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    folder.mkdir()
    building = [*pyproject["build-system"]["requires"], *wheel["hooks"]["custom"]["dependencies"]]
    (folder / "build.txt").write_text("\n".join(building) + "\n")
    for target, extras in EXTRAS.items():
        listed = [*project["dependencies"]]
        listed += [line for extra in extras for line in project["optional-dependencies"][extra]]
        (folder / f"{target}.txt").write_text("\n".join(listed) + "\n")


def packages(target: str) -> None:
    """Make the environment and install what an image needs. `TORCH` replaces the requirement of torch."""
    run(sys.executable, "-m", "venv", "--without-pip", str(ENVIRONMENT))
    torch = os.environ.get("TORCH", "")
    listed = Path(f"{target}.txt").read_text().split("\n")
    wanted = [torch if torch and line.startswith("torch>") else line for line in listed if line]
    pip("install", "--constraint", "constraints.txt", *wanted)
    site = next(ENVIRONMENT.glob("lib/python3*/site-packages"))
    (site / "ensemble.pth").write_text(f"{CODE}\n")
    tidy(site)
    compile_all(ENVIRONMENT)


def tidy(site: Path) -> None:
    """Remove what is not read when a process runs: tests, headers, stubs, static libraries."""
    for name in UNUSED:
        shutil.rmtree(site / name, ignore_errors=True)
    for path in (site / PROGRAMS).glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != PROGRAM:
            path.unlink()
    for folder in [path for name in UNUSED_FOLDERS for path in site.rglob(name) if path.is_dir()]:
        shutil.rmtree(folder, ignore_errors=True)
    for file in [path for path in site.rglob("*") if path.suffix in UNUSED_SUFFIXES and path.is_file()]:
        file.unlink()


def compiler() -> None:
    """Install what compiling our modules takes. The usual bases are Debian, and some have Python's headers."""
    headers = [] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["python3-dev"]
    run("apt-get", "update")
    run("apt-get", "install", "--yes", "--no-install-recommends", "gcc", "libc6-dev", *headers)


def code(folder: Path) -> None:
    """Build our distribution, and install for each image its part of it into a folder of its own.

    Compiled, if HATCH_BUILD_HOOKS_ENABLE=1.
    """
    whole = folder / "whole"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", ".")
    pip("install", "--no-deps", "--no-index", "--target", str(whole), *map(str, Path("wheels").glob("*.whl")))
    compile_all(whole)
    metadata = [path.name for path in whole.glob("*.dist-info")]
    for target, ours in OURS.items():
        for name in (*ours, *metadata):
            shutil.copytree(whole / name, folder / target / name)


def pip(*arguments: str) -> None:
    """The base's pip, on the environment."""
    run(sys.executable, "-m", "pip", "--python", str(PYTHON), *arguments)


def compile_all(folder: Path) -> None:
    """Byte-code beside every module; named by the sources' content, never by their times."""
    how = ["-q", "--invalidation-mode", "unchecked-hash", "-x", RARELY_IMPORTED]
    run(str(PYTHON), "-m", "compileall", *how, str(folder))


def run(*command: str) -> None:
    """Run a command; its failure ends the build."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
