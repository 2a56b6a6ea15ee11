"""The allocation: members, devices and profiles in; a matrix, its predicted throughput and its explanation out.

Pure: no I/O, no clock but the one passed in, no randomness but the seed passed in. May import numpy and scipy only.
"""
