"""Export of a run's student: a ``save_pretrained`` folder with a model card, optionally on the hub."""

from feddistill.release.folder import export, push, write_model

__all__ = ["export", "push", "write_model"]
