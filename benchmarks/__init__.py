"""Scripts that measure; each checks its result before it times anything and writes to `bench_results/`."""
