"""Interaction data: the common type, readers, splits, known data sets and the generator."""
