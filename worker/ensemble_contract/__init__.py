"""What crosses the borders between operator, gateway and worker: plans, wire messages, tensors.

May import: the standard library, numpy, msgspec. May not: any socket, event loop or other package of ours.
"""
