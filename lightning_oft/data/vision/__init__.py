"""Images: a folder or a data set of them, and the handwritten digits in a new domain."""
