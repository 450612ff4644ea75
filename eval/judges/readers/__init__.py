"""Blind reading: people say which of two responses is better, and what each one is, without knowing who wrote it."""
