"""Questions answered by measuring: speed against peers, ablations."""
