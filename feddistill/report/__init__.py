"""Reports of runs and studies: pages, tables, plots."""

from feddistill.report.run import as_csv, metric_rows, print_table, rendered, size, skew_lines, task_of, write

__all__ = ["as_csv", "metric_rows", "print_table", "rendered", "size", "skew_lines", "task_of", "write"]
