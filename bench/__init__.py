"""Benchmarks: feddistill_kernels against eager PyTorch, torch.compile and other libraries.

What ``feddistill bench`` imports is installed as ``feddistill.bench`` and uses relative imports.  The other
modules run in a clone only, as ``python -m bench.NAME``, and import ``bench.NAME``.
"""
