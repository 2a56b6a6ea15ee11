"""What an ensemble of MLPs answers to one row, against the same MLPs here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.support.models import make_mlp
from tests.support.operating import Operating

ROW = [0.5] * 64


async def check_answer(world: Operating, name: str, *seeds: int, weights: Sequence[float] | None = None) -> None:
    """Ask for ROW: the answer must be the mean of the MLPs of these seeds, weighted or not."""
    answer = await world.ask(name, [ROW])
    assert "outputs" in answer, answer
    with torch.no_grad():
        outputs = [make_mlp(seed=seed)(torch.tensor([ROW])).numpy() for seed in seeds]
    found = np.array(answer["outputs"][0]["data"]).reshape(1, 10)
    np.testing.assert_allclose(found, np.average(outputs, axis=0, weights=weights), rtol=1e-4, atol=1e-5)
