"""Rows from files and the hub: parsing, checking, splitting, batching and streaming."""
