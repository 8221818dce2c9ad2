"""What a balanced run is worth, counted in trials of a search for static weights."""
