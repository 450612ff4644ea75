"""PPO on the gate, and on the LM itself, on top of TRL's RLOOTrainer."""
