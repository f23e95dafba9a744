"""Collaborative Metric Learning (Hsieh et al., WWW 2017) with its regularisers, features, cold items and reports."""
