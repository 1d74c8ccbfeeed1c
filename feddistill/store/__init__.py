"""Run directories and logit files on disk."""
