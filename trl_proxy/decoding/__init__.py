"""How proposals of the frozen LM become a response: the gate in `generate`, and the loop of candidate features."""
