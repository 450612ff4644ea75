"""What a bare machine starts with: the embedded language model."""
