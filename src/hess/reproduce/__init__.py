"""Every table and figure of the paper from our implementation (``hess reproduce``).

A small file in ``experiments/`` describes each; what is measured is shared between them.
"""
