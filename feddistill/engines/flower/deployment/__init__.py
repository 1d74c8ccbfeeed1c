"""The folder from which a federation is deployed over Flower."""

from feddistill.engines.flower.deployment.folder import example, write

__all__ = ["example", "write"]
