"""What differs between Lightning's strategies, an adapter for each: where rotations live, real steps, checkpoints, merge."""
