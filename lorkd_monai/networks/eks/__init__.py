"""The operation of a layer on a batch of mixed tasks."""
