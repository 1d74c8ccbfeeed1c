"""The methods: federated distillation and the baselines, one paper a file, each with ``run`` and ``plan``."""
