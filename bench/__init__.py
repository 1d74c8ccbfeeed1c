"""Microbenchmarks of feddistill_kernels against eager PyTorch, torch.compile and peers."""
