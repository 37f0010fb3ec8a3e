"""Exports of an adapter: merged models, and folders for other programs, compared with the adapter first."""
