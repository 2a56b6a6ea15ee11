"""From kept outputs to answers: which outputs a request gets, combined how, in which datatype.

Reads the row store and asks the combiner; requests that finish together are combined as one batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from ensemble_contract.plan import GatewayPlan
from ensemble_contract.tensors import TensorSpec, fp32_to_bf16
from ensemble_gateway.combiner import make_rule
from ensemble_gateway.metrics import Metrics
from ensemble_gateway.queues import Request
from ensemble_gateway.request import Answer, Array
from ensemble_gateway.rowstore import RowStore
from ensemble_gateway.served import output_of_member


class Answers:
    """Makes the answers of one plan out of the row store, where its members have these `columns`, in its order."""

    def __init__(self, plan: GatewayPlan, columns: tuple[int, ...], store: RowStore, metrics: Metrics) -> None:
        self._specs = plan.outputs
        self._names = [member.name for member in plan.members]
        self._everyone = tuple(range(len(plan.members)))
        self._columns = columns
        self._store = store
        self._metrics = metrics
        softmax = all(member.activation == "softmax" for member in plan.members)
        weights = [member.weight for member in plan.members]
        self._rule = None if plan.rule == "none" else make_rule(plan.rule, weights, softmax)

    def outputs(self, member: int | None, ranges: Sequence[tuple[int, int]]) -> list[Array]:
        """The outputs of the ensemble (None) or of one member for these rows, all its members having answered.

        In the model's order and in the declared datatypes; they may be views of the store.
        """
        columns = self._columns if member is None else (self._columns[member],)
        stacks = [self._store.stack(output, columns, ranges) for output in range(len(self._specs))]
        rule = self._rule
        if member is not None or rule is None:
            return [
                _declared(stack[position], spec)
                for position in range(len(columns))
                for stack, spec in zip(stacks, self._specs, strict=True)
            ]
        began = time.perf_counter()
        combined = [
            _declared(rule.combine(s, self._everyone), spec) for s, spec in zip(stacks, self._specs, strict=True)
        ]
        self._metrics.combined(len(combined[0]), time.perf_counter() - began)
        return combined

    def in_full(self, request: Request) -> Answer:
        """The answer of one request with what its members have answered, and who they are."""
        header = request.sink.header
        members = tuple([member for member in self._everyone if request.done >> self._columns[member] & 1])
        columns = [self._columns[member] for member in members]
        outputs: dict[str, Array] = {}
        for index, spec in enumerate(self._specs):
            stack = self._store.stack(index, columns, request.ranges)
            if header.model.member is not None:
                outputs[spec.name] = _declared(stack[0], spec)
            elif self._rule is not None:
                outputs[spec.name] = _declared(self._rule.combine(stack, members), spec)
            if header.members or self._rule is None:
                for position, member in enumerate(members):
                    name = output_of_member(self._names[member], spec.name)
                    outputs[name] = _declared(stack[position], spec)
        used = tuple([self._names[member] for member in members])
        missing = request.wanted & ~request.done
        absent = [self._names[member] for member in self._everyone if missing >> self._columns[member] & 1]
        return Answer(outputs, used, tuple(absent))


def _declared(values: Array, spec: TensorSpec) -> Array:
    """Carried values in the declared datatype."""
    if spec.datatype == "FP16":
        return values.astype(np.float16)
    if spec.datatype == "BF16":
        return fp32_to_bf16(values)
    return values
