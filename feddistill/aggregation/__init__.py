"""From the clients' answers to one teacher: rules, client weights, attacks, diagnostics.

Importing this package does not import torch, because the configuration needs the table of rules.
"""
