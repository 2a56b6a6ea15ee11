"""The measuring of members on the workers held: jobs given, results written to the ConfigMap as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

from ensemble_operator.control import conditions as c
from ensemble_operator.control.book import Book
from ensemble_operator.control.colocation import assign_sharing, is_sharing, learn_sharing, rows_to_share
from ensemble_operator.control.observe import Observer, WorkerView
from ensemble_operator.control.onepass import Pass
from ensemble_operator.control.planning import members_to_serve, tensors_of, wanted_sources
from ensemble_operator.control.profiling import (
    Measurer,
    Needs,
    assign,
    failures,
    learn,
    needs,
    note_ready,
    obsolete,
)
from ensemble_operator.control.stepping import is_settled
from ensemble_operator.control.world import World
from ensemble_operator.fleet import Fleet, ProfileJob, Unreachable

log = logging.getLogger(__name__)

# Between two looks at measurements: those that the first plan waits for, others, and such that nobody can take now.
URGENT_PERIOD_S, PERIOD_S, IDLE_PERIOD_S = 0.5, 3.0, 10.0
COMING = ("fetching", "loading")


class Measuring:
    """Gives workers what is to be measured, and learns what they found."""

    def __init__(self, world: World, fleet: Fleet, observer: Observer, keep: Callable[[Pass], Awaitable[None]]) -> None:
        """`keep` writes the book of a pass where it outlives the operator."""
        self._world, self._fleet, self._observer, self._keep = world, fleet, observer, keep

    async def go_on(self, one: Pass) -> bool:
        """Learn what is new, and have measured what is missing; whether enough is known for a plan."""
        spec = one.spec
        one.sources = wanted_sources(spec)
        workers = _workers_of(one)
        classes = _classes_of(workers)
        one.book = note_ready(_as_used_by(one.book, workers.values()), _ready(one))
        left = needs(spec, one.sources, classes, one.book, one.now)
        if left.now:
            left = await self._learn_and_give(one, workers)
        if left.retry_at is not None:
            one.again(max(1.0, left.retry_at - one.now))
        return self._say(one, classes, left)

    async def share(self, one: Pass) -> None:
        """Once all members are measured and served: have it measured what they get done that share a GPU."""
        plan, asked = one.look.mirror.plan, one.asked
        if plan is None or asked is None or one.members is None or not is_settled(one.look, plan.generation):
            return
        workers = _workers_of(one)
        # What is loaded now needs its memory first.
        if any(i.state in COMING for view in workers.values() if view.report for i in view.report.instances):
            return
        rows = rows_to_share(asked.problem, one.book, one.now)
        if not rows or needs(one.spec, one.sources, _classes_of(workers), one.book, one.now).now:
            return
        measurers = await self._look(one, workers)
        sources, serving = one.members.sources, {view.name: _instances(view) for view in workers.values()}
        tensors = tensors_of(one.spec, sources, one.book)
        rows = rows_to_share(asked.problem, one.book, one.now)
        jobs = assign_sharing(rows, sources, tensors, measurers, serving, one.book)
        if jobs:
            await self._keep(one)
            await self._give(one, jobs, workers)
        one.again(PERIOD_S if measurers else IDLE_PERIOD_S)

    async def _look(self, one: Pass, workers: Mapping[str, WorkerView]) -> list[Measurer]:
        """What workers measure, with what they have found out put in the book."""
        reports = await self._observer.profiles(one.key, workers.values(), one.token)
        measurers = [
            Measurer(name, view.device.device_class, reports[name], view.device.libraries)
            for name, view in workers.items()
            if name in reports and view.device is not None
        ]
        one.book = learn(one.book, measurers, one.spec.spec.batching.sizes, one.now)
        before = one.book.sharing
        one.book = learn_sharing(one.book, measurers, one.now)
        for key, found in one.book.sharing.items():
            if found != before.get(key):
                log.info("co-location on %s: %s", key[0], found.error or f"factor {found.factor:.3f}")
        return measurers

    async def _learn_and_give(self, one: Pass, workers: Mapping[str, WorkerView]) -> Needs:
        measurers = await self._look(one, workers)
        left = needs(one.spec, one.sources, _classes_of(workers), one.book, one.now)
        await self._end_obsolete(one, measurers, workers, urgent=bool(left.urgent))
        # What workers of a former image would find out counts for nothing.
        able = [m for m in measurers if m.libraries == one.book.libraries_of(m.device_class)]
        jobs = assign(one.spec, one.sources, left.now, able)
        if jobs:
            # A worker that is given another job forgets the results of the former.
            await self._keep(one)
            await self._give(one, jobs, workers)
        if jobs or any(m.report.state == "running" for m in measurers):
            one.again(URGENT_PERIOD_S if left.urgent else PERIOD_S)
        else:
            one.again(IDLE_PERIOD_S)
        return left

    def _say(self, one: Pass, classes: Sequence[str], left: Needs) -> bool:
        total = len(one.spec.spec.members)
        if not classes:
            return one.look.mirror.target is not None
        if left.urgent:
            open_members = sorted({need.member for need in left.urgent})
            message = f"measuring {', '.join(open_members)}: {total - len(open_members)} of {total} members known"
            one.found.say(c.PROFILED, holds=False, reason="Measuring", message=message)
            return False
        failed = failures(one.spec, one.sources, classes, one.book, one.now)
        able = total - len(failed)
        causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
        if failed and able < max(1, one.spec.spec.combine.quorum) and one.look.mirror.target is None:
            message = f"{able} of {total} members can be loaded: {causes}"
            one.found.say(c.PROFILED, holds=False, reason="ModelsFail", message=message)
            return able > 0
        message = f"{able} of {total} members known on {', '.join(sorted(set(classes)))}"
        if left.now:
            message += "; more batch sizes are measured in the background"
        if causes:
            message += f"; {causes}"
        one.found.say(c.PROFILED, holds=True, reason="Profiled", message=message)
        return able > 0 or bool(members_to_serve(one.spec, failed, one.look.mirror.plan).kept)

    async def _end_obsolete(
        self, one: Pass, measurers: Sequence[Measurer], workers: Mapping[str, WorkerView], *, urgent: bool
    ) -> None:
        """End what nobody wants any more, and, where members wait to be measured, what can wait."""
        digests = [source.digest for source in one.sources.values()]
        for measurer in measurers:
            if obsolete(measurer, digests) or (urgent and is_sharing(measurer.report)):
                address = self._observer.address(one.key, workers[measurer.worker].pod)
                try:
                    await self._fleet.end_profile(address, one.token)
                except Unreachable as error:
                    log.info("a measurement that nobody wants goes on: %s", error)

    async def _give(self, one: Pass, jobs: Mapping[str, ProfileJob], workers: Mapping[str, WorkerView]) -> None:
        self._world.cluster.guard()

        async def give(worker: str, job: ProfileJob) -> None:
            what = _in_words(job)
            try:
                await self._fleet.put_profile(self._observer.address(one.key, workers[worker].pod), job, one.token)
            except Unreachable as error:
                log.warning("%s cannot be given the measuring of %s: %s", worker, what, error)
            else:
                log.info("%s measures %s", worker, what)

        await asyncio.gather(*(give(worker, job) for worker, job in jobs.items()))


def _ready(one: Pass) -> Iterator[tuple[str, str]]:
    """Versions that serve, and on which class of device."""
    for view in one.look.workers:
        if view.device is not None and view.report is not None:
            yield from ((i.digest, view.device.device_class) for i in view.report.instances if i.state == "ready")


def _workers_of(one: Pass) -> dict[str, WorkerView]:
    return {view.name: view for view in one.held if view.device is not None}


def _classes_of(workers: Mapping[str, WorkerView]) -> list[str]:
    return [view.device.device_class for view in workers.values() if view.device is not None]


def _instances(view: WorkerView) -> int:
    return len(view.report.instances) if view.report is not None else 0


def _in_words(job: ProfileJob) -> str:
    if job.colocation is not None:
        return f"{', '.join(member.source.name for member in job.colocation.members)} together"
    return f"{', '.join(task.source.name for task in job.tasks)} at batch sizes {list(job.tasks[0].sizes)}"


def _as_used_by(book: Book, workers: Iterable[WorkerView]) -> Book:
    """The book with what workers run models with, and take while they are idle."""
    devices = [view.device for view in workers if view.device is not None]
    book = book.with_running((device.device_class, device.libraries) for device in devices)
    for device in devices:
        book = book.with_idle(device.device_class, device.libraries, device.overhead_bytes)
    return book
