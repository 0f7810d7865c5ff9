"""An adapter for each of Lightning's strategies: where rotations live, real steps, checkpoints, merge."""
