"""Adapters in a model: attaching, activating, merging, detaching, and saving the model with them."""
