"""The parts of ``benchmarks/accuracy.py``: data, methods, variants, batches, models, training, statistics and results."""
