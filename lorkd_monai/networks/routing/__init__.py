"""Which row of a batch belongs to which task."""
