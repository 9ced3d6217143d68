"""What travels between processes: frames, pickles, streams."""
