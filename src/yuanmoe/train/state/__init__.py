"""What a run goes on from: checkpoints, and the state beside them."""
