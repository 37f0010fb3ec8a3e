"""Comparison of methods over seeds: planning, running, significance and recommendation."""
