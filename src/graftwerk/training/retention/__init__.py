"""Strategies against forgetting: losses beside the task's own, each in one file with its paper."""
