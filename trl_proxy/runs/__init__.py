"""What the training scripts share: arguments, resuming, the process, the clock and the record."""
