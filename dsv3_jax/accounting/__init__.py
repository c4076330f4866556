"""Parameters, FLOPs and saved activations of a configuration, counted on the model's own abstract arrays.

`hardware` holds vendors' figures for accelerators. Training uses these counts for MFU, planning for its estimates.
"""
