"""Handing an adapter over: merged models and folders for other programs, compared with the adapter before they exist."""
