"""Recommenders: where vectors come from, what a batch is, who is first, how a list is judged."""
