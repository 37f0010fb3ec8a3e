"""Adapter folders, in PEFT's format and our own: writing, checking and restoring."""
