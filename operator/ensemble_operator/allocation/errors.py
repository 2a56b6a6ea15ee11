"""What can be wrong with a planning problem. The messages say what, which object, and what to do."""

from __future__ import annotations

MIB = 1 << 20


class AllocationError(Exception):
    """Base of the errors of planning."""


class InvalidProblem(AllocationError):
    """The members, devices or profiles contradict themselves; `faults` has one sentence for each fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class NotSolved(AllocationError):
    """The solver finds no optimum of a well-formed program."""


class DoesNotFit(AllocationError):
    """A member finds no device with enough free memory beside the members placed before it.

    `undecided` says how it was looked for another placement, where it is not proven that there is none.
    """

    def __init__(
        self,
        member: str,
        batch_size: int,
        need_bytes: float,
        device: str,
        largest_free_bytes: float,
        undecided: str = "",
    ) -> None:
        need_mib, free_mib = -int(-need_bytes // MIB), int(max(largest_free_bytes, 0) // MIB)
        verdict = f"finds no room by worst-fit decreasing, and {undecided}" if undecided else "fits on no device"
        super().__init__(
            f"member {member!r} {verdict}: it needs {need_mib} MiB at batch size {batch_size}, and the largest "
            f"free space is {free_mib} MiB, on device {device!r}; add a device, lower the headroom or drop a member"
        )
        self.member = member
        self.batch_size = batch_size
        self.need_bytes = need_bytes
        self.device = device
        self.largest_free_bytes = largest_free_bytes

    def left_undecided(self, how: str) -> DoesNotFit:
        """The same, where a longer search might find another placement."""
        return DoesNotFit(self.member, self.batch_size, self.need_bytes, self.device, self.largest_free_bytes, how)
