"""What is done with a trained decomposition: tasks added, ranks compared, norms estimated anew, files taken over."""
