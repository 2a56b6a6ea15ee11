"""What a pod looks like from inside: ports, folders, files, environment. Written by manifests, read by processes."""

from __future__ import annotations

HTTP_PORT = 8000
ADMIN_PORT = 8081
DATA_PORT = 5555

# The plan's ConfigMap, the process's Secret (CURVE keys and the admin token), and an emptyDir for what is kept.
PLAN_FOLDER = "/etc/ensemble/plan"
KEYS_FOLDER = "/etc/ensemble/keys"
STATE_FOLDER = "/var/lib/ensemble"
# Each claim of a `pvc://CLAIM/PATH` is mounted, read-only, at CLAIMS_FOLDER/CLAIM.
CLAIMS_FOLDER = "/models"

# The one key of the plan's ConfigMap: an EnsemblePlan as JSON.
PLAN_FILE = "plan.json"
# Beside the keys of `ensemble_contract.keys`: what every request to an admin API carries.
TOKEN_FILE = "admin.token"  # noqa: S105  # a file's name

# Lets a worker take CPU cores as its device where it was told to take a GPU: for clusters whose GPUs are pretended.
CPU_INSTEAD_OF_GPU = "ENSEMBLE_CPU_INSTEAD_OF_GPU"
