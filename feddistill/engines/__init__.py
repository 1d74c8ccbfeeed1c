"""What carries a federation besides one process; each engine is imported only where it is asked for."""
