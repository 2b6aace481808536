"""Sweeps: what was planned, what became of it, how far it is, and the upload of its W&B runs."""
