"""Backends, which answer requests: one module per kind of server, and one for a model in this process."""
