"""One program from a laptop to a pod: the mesh, what is cut over which of its axes, and who talks to whom."""
