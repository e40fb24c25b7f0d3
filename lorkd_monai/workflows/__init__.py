"""What is done with a trained decomposition: tasks added, ranks compared, norms estimated anew, checkpoints taken over."""
