"""Choosing how a model is served: what scripts.optimize does."""
