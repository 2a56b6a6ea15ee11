"""The gateway: takes V2 requests, keeps their rows, batches, dispatches to workers, combines, answers.

Pure cores: `rowstore`, `dispatcher`, `combiner`, `v2`. Shells: `edge`, `routes`, `links`, `admin`, `app`.
Between them, on the event loop: `pipeline` for a plan, `engine` for what plans share, `gateway` for their changes.
May import: ensemble_contract, aiohttp, uvloop, httptools, pyzmq (in `links`), numpy.
May not: torch, the other packages.
"""
