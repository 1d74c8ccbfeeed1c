"""Methods: federated distillation and the baselines, one module each, with ``run`` and ``plan``."""
