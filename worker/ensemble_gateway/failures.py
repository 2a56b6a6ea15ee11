"""Why a request gets no answer, in words for its client. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_gateway.queues import Failure, Request, bits


def causes(request: Request, names: Sequence[str]) -> str:
    """What went wrong with each member that has failed; `names` by column."""
    return "; ".join(f"member {names[member]}: {text}" for member, text in (request.causes or {}).items())


def too_late(request: Request, now: float, names: Sequence[str], alive: int) -> Failure:
    """The deadline has passed without a quorum: 503 where a member has no live instance, else 504."""
    pending = request.wanted & ~(request.done | request.failed)
    missing = ", ".join(names[member] for member in bits(pending))
    dead = [names[member] for member in bits(pending & ~alive)]
    waited = f"{now - request.admitted_at:.3f} s"
    failed = f"; {causes(request, names)}" if request.causes else ""
    if dead:
        text = f"no live instance of {', '.join(dead)} after {waited}; still waiting for: {missing}{failed}"
        return Failure(503, text)
    have = request.done.bit_count()
    text = f"{have} of the {request.quorum} members needed answered in {waited}; missing: {missing}{failed}"
    return Failure(504, text)
