"""What is done with the experts of a trained decomposition."""
