"""One reconcile's notebook: what it looks at, what it has found, what it leaves for the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble_contract.plan import ModelSource
from ensemble_operator.allocation.errors import AllocationError
from ensemble_operator.api import Devices, InferenceEnsemble
from ensemble_operator.control.book import Book
from ensemble_operator.control.conditions import Conditions
from ensemble_operator.control.failing import Version
from ensemble_operator.control.kinds import Key, Manifest
from ensemble_operator.control.observe import Observed, WorkerView
from ensemble_operator.control.planning import Members
from ensemble_operator.control.pods import Pod
from ensemble_operator.control.questions import PlanQuestion
from ensemble_operator.control.status import Event
from ensemble_operator.control.target import Target, TargetDevice
from ensemble_operator.profiles.measurements import Measurement


class Refusal(AllocationError):
    """What the planning process found wrong, in its words."""


class Unfitting(Refusal):
    """The members do not fit; the message names one, its need and the largest free space."""


@dataclass(slots=True)
class Memory:
    """What this process remembers of an ensemble between reconciles: only what saves work or noise, never truth.

    `coming_since`: since when it waits for pods that start; `returning_since`: for such that are made again;
    `unready_since`: since when not all members answer; `uncreated_since`: since when pods are missing that nobody made;
    `refused`: the last question without an answer, and why; `rows`: what gateways had answered at a time, by the life
    of their container; `replaced`: workers that were emptied and deleted for a new pod template; `failing`: versions of
    members that have not run since they failed, and why; `told`: those of them that had their event; `matrices`: those
    that had theirs since all was well; `book`: the last one, for when the ConfigMap is deleted or edited.
    """

    coming_since: float | None = None
    returning_since: float | None = None
    unready_since: float | None = None
    uncreated_since: float | None = None
    refused: tuple[str, Exception] | None = None
    rows: tuple[float, Mapping[str, int]] | None = None
    replaced: set[str] = field(default_factory=set)
    failing: dict[Version, str] = field(default_factory=dict)
    told: set[Version] | None = None
    matrices: set[int] = field(default_factory=set)
    book: Book = field(default_factory=Book)

    @property
    def does_not_fit(self) -> bool:
        """Whether the members did not fit on the devices that were there last."""
        return self.refused is not None and isinstance(self.refused[1], Unfitting)


@dataclass(slots=True)
class Pass:
    """One reconcile of one ensemble, filled in from stage to stage.

    `change` is the event of another matrix, for when it is written.
    """

    key: Key
    document: Manifest
    now: float
    memory: Memory
    found: Conditions = field(default_factory=Conditions)
    events: list[Event] = field(default_factory=list)
    change: Event | None = None
    ensemble: InferenceEnsemble | None = None
    token: str = ""
    seen: Observed | None = None
    wanted: int = 0
    held: tuple[WorkerView, ...] = ()
    draining: str = ""
    no_room: str = ""
    sources: Mapping[str, ModelSource] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    measured: Mapping[tuple[str, str], Measurement] = field(default_factory=dict)
    devices: Mapping[str, TargetDevice] = field(default_factory=dict)
    members: Members | None = None
    asked: PlanQuestion | None = None
    target: Target | None = None
    needs: Mapping[tuple[str, str, int], float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    retry_s: float | None = None

    @property
    def uid(self) -> str:
        """The resource's."""
        return str(self.document["metadata"]["uid"])

    @property
    def generation(self) -> int:
        """The resource's."""
        return int(self.document["metadata"].get("generation") or 0)

    @property
    def spec(self) -> InferenceEnsemble:
        """The parsed resource; only asked for once there is one."""
        assert self.ensemble is not None  # noqa: S101  set by the first stage
        return self.ensemble

    @property
    def pools(self) -> tuple[Devices, ...]:
        """The pools that the resource asks for."""
        return self.spec.pools

    def is_wanted(self, pod: Pod) -> bool:
        """Whether a worker's pod is one of those that its pool shall have."""
        return pod.pool < len(self.pools) and pod.ordinal < self.pools[pod.pool].count

    @property
    def look(self) -> Observed:
        """What was observed; only asked for once that is done."""
        assert self.seen is not None  # noqa: S101  set by the first stages
        return self.seen

    def again(self, after_s: float) -> None:
        """Look again after so many seconds at the latest."""
        self.retry_s = after_s if self.retry_s is None else min(self.retry_s, after_s)
