"""Adapter folders without a run, as the tests of exports make them."""

from tests.exports.conftest import make_adapter

__all__ = ["make_adapter"]
