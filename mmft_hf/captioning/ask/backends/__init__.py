"""Who writes captions: one module per kind of server, one for a model in this process, one for texts without a model."""
