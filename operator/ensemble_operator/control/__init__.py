"""The operator of a cluster: observe, acquire, profile, plan, push, report.

`process` wires it; `handlers` and the watches put keys of ensembles into one queue; `reconcile` does the rest. May
import kubernetes in `credentials` and kopf in `handlers` only. Everything else sees plain dicts and domain errors.
"""
