"""Metrics of ranked lists; pure functions that know nothing of models."""
