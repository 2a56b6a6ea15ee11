"""`ensemble serve` beside the raw bound and a peer, interleaved in one run, every answer checked.

For each workload all systems are started and warm; for each load every system has a window in turn, again and again,
in an order that rotates: what the machine does meanwhile meets them all. Medians are reported, and shares of the raw
bound. Ours has one setting for all loads, the default; the raw bound and the peer have their best for each
load, found beforehand. It is there twice: with members as our workers execute them (`raw`), and as PyTorch loads them
(`plain raw`), of which the targets are shares.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from benchmarks import loads, preparation, report, servers, workloads
from benchmarks.children import START_TIMEOUT_S, Child, ChildFailed, exit_on_sigterm
from benchmarks.loadgen import Window, WindowResult
from benchmarks.raw import RawBound, Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.answers import Target
    from benchmarks.loads import Load
    from benchmarks.peers.mosec_server import MosecSettings
    from benchmarks.workloads import Workload

WINDOW_TIMEOUT_S = 600.0
PEER_CALIBRATION_S = 0.4
OURS = "ours"
STOCK = "ours, tritonclient"
OTHER_LINKS = {
    "zeromq": ("ours, zeromq", ("--link", "zeromq", "--encryption", "none")),
    "zeromq-curve": ("ours, zeromq curve", ("--link", "zeromq", "--encryption", "curve")),
}
# Peers by their option: the name in the table, and whether members run as PyTorch loads them instead of by our code.
PEERS = {"mosec": ("mosec", False), "mosec-plain": ("mosec, plain members", True)}
PACKAGES = ("torch", "numpy", "uvloop", "mosec", "tritonclient")


class Options(msgspec.Struct, frozen=True):
    """What to run; the command line in types."""

    workloads: tuple[str, ...]
    loads: tuple[str, ...]
    windows: int
    window_s: float
    peers: tuple[str, ...]
    links: tuple[str, ...]
    cache: Path
    json: Path | None


class Generators:
    """The load generators of a workload: ours at protocol level, and the stock client."""

    def __init__(self, workload: Workload, logs: Path, undo: ExitStack) -> None:
        arguments = [workload.folder, str(os.getpid())]
        self._fast = Child("benchmarks.loadgen", arguments, logs / "loadgen.log")
        undo.callback(self._fast.stop)
        self._stock = Child("benchmarks.stock_client", arguments, logs / "stock_client.log")
        undo.callback(self._stock.stop)

    def window(self, target: Target, load: Load, window_s: float, *, stock: bool = False) -> WindowResult:
        """One window on a server."""
        child = self._stock if stock else self._fast
        window = Window(target, load.connections, load.rows, window_s, timeout_s=WINDOW_TIMEOUT_S)
        return child.ask(window, WindowResult, WINDOW_TIMEOUT_S + START_TIMEOUT_S)


class Mosec:
    """The peer: one server for each setting that is the best for some load."""

    def __init__(
        self,
        workload: Workload,
        asked: Sequence[Load],
        generators: Generators,
        cores: Sequence[int],
        logs: Path,
        *,
        plain: bool,
    ) -> None:
        rates: dict[Load, dict[MosecSettings, float]] = {load: {} for load in asked}
        candidates = {load: servers.mosec_candidates(workload, load, cores, plain=plain) for load in asked}
        for settings in dict.fromkeys(s for found in candidates.values() for s in found):
            server = servers.start_mosec(settings, logs)
            try:
                for load in (load for load in asked if settings in candidates[load]):
                    rates[load][settings] = generators.window(server.target, load, PEER_CALIBRATION_S).rows_per_s
            finally:
                server.stop()
        self.best = {load: max(found, key=lambda s, of=found: of[s]) for load, found in rates.items()}  # type: ignore[misc]
        self.servers: dict[MosecSettings, servers.ServerProcess] = {}
        with ExitStack() as undo:
            undo.callback(self.stop)
            for settings in dict.fromkeys(self.best.values()):
                self.servers[settings] = servers.start_mosec(settings, logs)
            undo.pop_all()

    def target(self, load: Load) -> Target:
        """The server with the best setting for a load."""
        return self.servers[self.best[load]].target

    def stop(self) -> None:
        """End the servers."""
        for server in self.servers.values():
            server.stop()


class System(NamedTuple):
    """A server under a name, and whether the stock client asks it; `process` is ours, whose CPU is looked at."""

    name: str
    target: Target
    stock: bool = False
    process: servers.ServerProcess | None = None


class Bench:
    """All systems of one workload, started and warm."""

    def __init__(self, workload: Workload, options: Options, undo: ExitStack) -> None:
        self._workload = workload
        self._options = options
        self.asked = [load for load in loads.LOADS_OF[workload.name] if not options.loads or load.name in options.loads]
        logs = Path(workload.folder) / "logs"
        cores = sorted(os.sched_getaffinity(0))
        self._generators = Generators(workload, logs, undo)
        self._bounds: list[RawBound] = []
        for name, plain in (("raw", False), ("plain raw", True)):
            say(f"{workload.name}: looking for the best settings of {name}")
            self._bounds.append(RawBound(workload, self.asked, cores, logs, plain=plain))
            undo.callback(self._bounds[-1].stop)
        self._peers: dict[str, Mosec] = {}
        for name, plain in (PEERS[peer] for peer in options.peers):
            say(f"{workload.name}: looking for the best settings of {name}")
            self._peers[name] = Mosec(workload, self.asked, self._generators, cores, logs, plain=plain)
            undo.callback(self._peers[name].stop)
        say(f"{workload.name}: starting ensemble serve")
        self._ours: dict[str, servers.ServerProcess] = {}
        undo.callback(self._stop_ours)
        self._ours[OURS] = servers.start_ours(workload, OURS, (), logs)
        for link in options.links:
            name, arguments = OTHER_LINKS[link]
            self._ours[name] = servers.start_ours(workload, name, arguments, logs)

    def _stop_ours(self) -> None:
        for server in self._ours.values():
            server.stop()

    def cell(self, load: Load) -> report.Cell:
        """The windows of all systems under one load, interleaved."""
        windows: dict[str, list[WindowResult]] = {}
        cpu_s: dict[str, dict[str, float]] = {}
        turns: list[Callable[[], None]] = []
        rates: list[dict[Setting, list[float]]] = []
        for bound in self._bounds:
            found: dict[Setting, list[float]] = {setting: [] for setting in bound.finalists[load]}
            turns += [partial(self._raw_window, bound, found, setting, load) for setting in found]
            rates.append(found)
        for system in self._systems(load):
            windows[system.name] = []
            cpu_s[system.name] = {}
            turns.append(partial(self._server_window, windows[system.name], cpu_s[system.name], system, load))
        for turn in range(self._options.windows):
            for step in range(len(turns)):
                turns[(turn + step) % len(turns)]()
        settings = {name: str(peer.best[load]) for name, peer in self._peers.items()}
        measured = tuple(
            report.Measured(
                name,
                tuple(results),
                settings.get(name, ""),
                loads.target_of(self._workload.name, name, load),
                cpu_s[name],
            )
            for name, results in windows.items()
        )
        raw, plain = ({str(setting): tuple(those) for setting, those in of.items()} for of in rates)
        return report.Cell(self._workload.name, load, raw, plain, measured)

    def memory_bytes(self) -> dict[str, int]:
        """Memory of each server now."""
        found = {name: server.memory_bytes() for name, server in self._ours.items()}
        for peer in self._peers.values():
            found |= {f"mosec {settings}": server.memory_bytes() for settings, server in peer.servers.items()}
        return found

    def _raw_window(self, bound: RawBound, rates: dict[Setting, list[float]], setting: Setting, load: Load) -> None:
        rates[setting].append(bound.rows_per_s(setting, load, self._options.window_s))

    def _server_window(self, results: list[WindowResult], cpu_s: dict[str, float], system: System, load: Load) -> None:
        before = system.process.cpu_s() if system.process is not None else {}
        results.append(self._generators.window(system.target, load, self._options.window_s, stock=system.stock))
        after = system.process.cpu_s() if system.process is not None else {}
        for part, seconds in after.items():
            cpu_s[part] = cpu_s.get(part, 0.0) + seconds - before.get(part, 0.0)

    def _systems(self, load: Load) -> list[System]:
        systems = [System(name, server.target, process=server) for name, server in self._ours.items()]
        if load == loads.ONE:
            systems.append(System(STOCK, self._ours[OURS].target, stock=True))
        return systems + [System(name, peer.target(load)) for name, peer in self._peers.items()]


def run(options: Options) -> report.Report:
    """All workloads; what is done so far is in the JSON file after every cell."""
    cells: list[report.Cell] = []
    memory_bytes: dict[str, dict[str, int]] = {}
    machine = {
        "cores": str(len(os.sched_getaffinity(0))),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    machine |= {package: version(package) for package in PACKAGES}

    def whole() -> report.Report:
        made = report.Report(machine, options.window_s, options.windows, tuple(cells), memory_bytes)
        if options.json is not None:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(made)))
        return made

    for name in options.workloads:
        say(f"{name}: preparing")
        workload = preparation.prepare(name, options.cache)
        with ExitStack() as undo:
            bench = Bench(workload, options, undo)
            for load in bench.asked:
                cells.append(bench.cell(load))
                print(report.table(cells[-1:]), flush=True)
                whole()
            memory_bytes[name] = bench.memory_bytes()
    return whole()


def parse(arguments: Sequence[str] | None) -> Options:
    """The command line.

    Raises SystemExit with a usage message.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--workloads", default="tiny,cnn,imagenet", help="of %(default)s")
    parser.add_argument("--loads", default="", help=f"only these, of {', '.join(load.name for load in loads.LOADS)}")
    parser.add_argument("--windows", type=int, default=5, help="windows a system and load (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=1.5, help="seconds a window (default: %(default)s)")
    parser.add_argument("--peers", default="", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--links", default="", help=f"further links, of {', '.join(OTHER_LINKS)}")
    parser.add_argument(
        "--cache", type=Path, default=workloads.CACHE, help="where models are kept (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all windows to this file")
    parser.add_argument("--quick", action="store_true", help="2 windows of 0.3 s: does it run, not how fast")
    given = parser.parse_args(arguments)
    names = {
        "workloads": (_words(given.workloads), workloads.NAMES),
        "loads": (_words(given.loads), tuple(load.name for load in loads.LOADS)),
        "peers": (_words(given.peers), tuple(PEERS)),
        "links": (_words(given.links), tuple(OTHER_LINKS)),
    }
    for option, (words, known) in names.items():
        for word in words:
            if word not in known:
                parser.error(f"--{option}: {word!r} is not one of {', '.join(known)}")
    if given.windows < 1 or not 0 < given.window_s <= WINDOW_TIMEOUT_S / 4:
        parser.error(f"--windows must be at least 1, --window-s above 0 and at most {WINDOW_TIMEOUT_S / 4:g}")
    windows, window_s = (2, 0.3) if given.quick else (given.windows, given.window_s)
    return Options(
        names["workloads"][0],
        names["loads"][0],
        windows,
        window_s,
        names["peers"][0],
        names["links"][0],
        given.cache,
        given.json,
    )


def say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. 0 if every promise is met, 3 if one is not, 1 if a process failed."""
    options = parse(arguments)
    try:
        made = run(options)
    except ChildFailed as error:
        say(str(error))
        return 1
    print("\n" + report.table(made.cells))
    for workload, servers_bytes in made.memory_bytes.items():
        print(
            f"\n{workload}, memory: "
            + ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in servers_bytes.items())
        )
    failed = report.unmet(made.cells)
    print("\n" + ("\n".join(failed) if failed else "Every promise is met."))
    return 3 if failed else 0


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main())
