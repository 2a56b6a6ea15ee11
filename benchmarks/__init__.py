"""Measurements of what the product promises: speed against the raw bound and against peers, on the machine at hand.

May import: everything. Nothing else in the repository imports from here, except the tests of this package.
"""
