"""Evaluation: one record per method and seed, and the tables and plots that are drawn from the records alone."""
