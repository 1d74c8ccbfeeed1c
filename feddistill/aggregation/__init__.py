"""Client answers to one teacher: rules, client weights, attacks, diagnostics.

Importing this package does not import torch: configurations name its rules.
"""
