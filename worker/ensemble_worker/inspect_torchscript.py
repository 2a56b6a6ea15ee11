"""What of a TorchScript archive (torch.jit.save) may be given to torch.jit.load.

torch.jit.load reads the two pickles of an archive with a restricted unpickler of its own, in C++: it imports no
Python and calls nothing but constructors of tensors and of the classes in `code/`. That code is TorchScript, which is
compiled, not executed as Python, but it runs at load (`__setstate__`) and may call operators that open files or the
network. So the code is searched for those, the pickles for names that torch.jit.save never writes, and debug pickles
are left out. A file of torch.save looks alike and is a Python pickle: it is refused.
"""

from __future__ import annotations

import pickletools
import re
from typing import TYPE_CHECKING

from ensemble_worker.archive import Archive, ArchiveView, open_archive
from ensemble_worker.errors import InvalidArchive

if TYPE_CHECKING:
    from pathlib import Path

PICKLES = ("data.pkl", "constants.pkl")
KEPT = re.compile(r"version|byteorder|\.data/.*|(data|constants)/\d+|(data|constants)\.pkl|code/[\w/.]+\.py")
LEFT_OUT = re.compile(r"traced_inputs(\.pkl|/\d+)|extra/.*|code/[\w/.]+\.debug_pkl")
SAFE_GLOBAL = re.compile(
    r"__torch__\.(?!torch\.classes\.)[\w.]+|__torch__\.torch\.classes\.(quantized|rnn|xnnpack)\.\w+"
    r"|torch\.jit\._pickle \w+|torch\._utils _rebuild_\w+|torch [A-Za-z]\w*Storage|torch (device|Size)"
    r"|collections OrderedDict"
)
UNSAFE_CODE = {
    re.compile(rb"\b(save|from_file)\b"): "opens files",
    re.compile(rb"\brpc_\w+"): "calls other machines",
    re.compile(
        rb"\bops\.(?!(prim|aten|prims|quantized|_quantized|onednn|mkldnn|mkldnn_prepacked|prepacked|torchvision)\.)\w+"
    ): ("is an operator of another library"),
    re.compile(rb"torch\.classes\.(?!(quantized|rnn|xnnpack)\.)\w+"): "is a class of another library",
    re.compile(rb"\^[A-Za-z_]\w*"): "is a Python function",
}
GLOBAL_OPCODES = frozenset({"GLOBAL", "INST"})
UNSAFE_OPCODES = frozenset({"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"})


def inspect_torchscript(path: Path) -> ArchiveView:
    """Inspect a TorchScript file; the archive to give to torch.jit.load.

    Raises InvalidArchive naming the part that is damaged, missing or refused.
    """
    archive = open_archive(path)
    if "constants.pkl" not in archive.records or not any(name.startswith("code/") for name in archive.records):
        raise InvalidArchive(
            "there is no TorchScript in it (code/ and constants.pkl): a pickle of torch.save is refused"
        )
    kept = []
    for name in archive.records:
        if KEPT.fullmatch(name):
            kept.append(name)
        elif not LEFT_OUT.fullmatch(name):
            raise InvalidArchive(f"{name}: torch.jit.save does not write this part, and it is refused")
    archive.verify(kept)
    for name in kept:
        if name.endswith(".py"):
            _check_code(name, archive.read(name))
    for name in PICKLES:
        _check_pickle(name, archive)
    return ArchiveView(archive, kept, {}, root="archive")


def _check_code(name: str, code: bytes) -> None:
    for pattern, why in UNSAFE_CODE.items():
        if found := pattern.search(code):
            raise InvalidArchive(f"{name} uses {found[0].decode()!r}, which {why}, and is refused")


def _check_pickle(name: str, archive: Archive) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(archive.read(name)):
            if opcode.name in UNSAFE_OPCODES:
                raise InvalidArchive(f"{name} has the pickle opcode {opcode.name}, and is refused")
            if opcode.name in GLOBAL_OPCODES and not _is_safe_global(str(argument)):
                raise InvalidArchive(f"{name} would import {str(argument).replace(' ', '.')!r}, and is refused")
    except ValueError as error:
        raise InvalidArchive(f"{name} is not a pickle: {error}") from error


def _is_safe_global(argument: str) -> bool:
    """`argument` is "module name", as pickletools gives it; TorchScript's own classes are "__torch__.module Class"."""
    return bool(SAFE_GLOBAL.fullmatch(argument) or SAFE_GLOBAL.fullmatch(argument.replace(" ", ".")))
