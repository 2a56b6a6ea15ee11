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


class DoesNotFit(AllocationError):
    """A member finds no device with enough free memory beside the members placed before it."""

    def __init__(self, member: str, batch_size: int, need_bytes: float, device: str, largest_free_bytes: float) -> None:
        need_mib, free_mib = -int(-need_bytes // MIB), int(max(largest_free_bytes, 0) // MIB)
        super().__init__(
            f"member {member!r} fits on no device: it needs {need_mib} MiB at batch size {batch_size}, and the largest "
            f"free space is {free_mib} MiB, on device {device!r}; add a device, lower the headroom or drop a member"
        )
        self.member = member
        self.batch_size = batch_size
        self.need_bytes = need_bytes
        self.device = device
        self.largest_free_bytes = largest_free_bytes
