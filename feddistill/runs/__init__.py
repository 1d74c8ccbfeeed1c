"""Whole runs: train, plan, results, re-runs from stored answers, verification, studies, trained students."""
