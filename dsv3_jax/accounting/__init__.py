"""Parameters, FLOPs and saved activations, counted on the model itself; hardware sheets."""
