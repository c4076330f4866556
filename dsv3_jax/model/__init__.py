"""The architecture, one idea a file."""
