"""Evaluation of a trained adapter: predictions, metrics with intervals, latency and memory."""
