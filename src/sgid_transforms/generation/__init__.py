"""Requests in, images out: the native batched engine, adapters for other pipelines, filters, and the generator."""
