"""Floor 4: the life cycle of an adapter inside a Lightning run."""
