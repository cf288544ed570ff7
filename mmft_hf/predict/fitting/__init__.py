"""Fitting heads. The names alone are here: settings list them without loading torch's models."""

NAMES = ("prototypes", "linear", "gda", "timo", "kernel", "tip", "retrieval", "text", "mean")
