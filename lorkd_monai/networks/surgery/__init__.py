"""Taking a backbone apart and putting it together."""
