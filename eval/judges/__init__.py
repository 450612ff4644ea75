"""Who decides which of two responses is better: recorded rewards, an LM, an endpoint."""
