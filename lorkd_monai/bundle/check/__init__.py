"""What the model zoo asks of a bundle, and what ours promise beyond that."""
