"""The tasks, one file each: training, prediction of the proxy texts, evaluation; and query-only models."""
