"""A run's student as a ``save_pretrained`` folder with a model card, locally and on the Hugging Face hub."""

from feddistill.release.folder import export, push, write_model

__all__ = ["export", "push", "write_model"]
