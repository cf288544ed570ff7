"""Asking: what is requested of a captioner, through which backend, and the journal that keeps the answers."""
