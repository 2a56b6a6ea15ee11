"""The control plane: the resource, the allocation, the local runner and the operator.

May import: ensemble_contract, aiohttp, scipy, kopf (in `handlers` and `__main__`), kubernetes (in `cluster`).
May not: torch, pynvml, ensemble_gateway, ensemble_worker. It talks to those over their admin APIs.
"""
