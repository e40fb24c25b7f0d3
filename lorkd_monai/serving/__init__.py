"""Many experts behind one call."""
