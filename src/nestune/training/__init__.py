"""The training loop and what it needs: learning rate, stopping, metrics, checkpoints."""
