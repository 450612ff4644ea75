"""The method in pure torch: configuration, candidates, gate, the record of decisions. It imports nothing else."""
