"""Text read with `datasets`, checked row by row, made into tokens and labels, packed, padded."""
