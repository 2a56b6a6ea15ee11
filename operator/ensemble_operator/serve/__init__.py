"""`ensemble serve`: one ensemble on this machine, processes instead of pods.

The sequence is `local`: prepare (read, measure, plan), start what serves, keep it alive. Never imports Kubernetes.
"""
