"""Recommenders with a gravity score: MF, LightGCN and CML on implicit feedback."""
