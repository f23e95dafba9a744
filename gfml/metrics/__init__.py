"""Metrics of ranked lists; pure functions that know nothing of models."""

# What a short table of recommenders shows.
HEADLINE = ("recall", "ndcg", "head_recall", "tail_recall", "coverage", "gini", "arp")
