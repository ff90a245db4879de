"""NVIDIA's own load generator, unmodified, against a pipeline; `python -m bench.perf_analyzer`."""
