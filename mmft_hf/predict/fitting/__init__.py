"""Fitting heads. The names alone are here: settings list them without loading torch's models."""

SEVERAL_LABELS = ("linear", "prototypes")  # the heads that know several labels per picture; the first is the default
NAMES = ("prototypes", "linear", "logistic", "gda", "timo", "kernel", "tip", "retrieval", "text", "mean")
