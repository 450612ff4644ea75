"""Figures, drawn from records and training logs alone."""
