"""The worker: owns one device, loads the members its plan places there, runs batches, reports.

May import: ensemble_contract, torch (in `predictor`, `backends`, `profiler`), pynvml (in `devices`), pyzmq (in
`links`), aiohttp (in `admin`), fsspec (in `storage`). May not: kopf, kubernetes, the other packages.
"""
