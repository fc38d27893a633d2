"""Training stages: what is trained on what, in which order."""
