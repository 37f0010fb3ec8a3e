"""Recommendation of a method for a model, rows, memory and an aim."""
