"""Load: the generator at protocol level, and `ensemble bench`, which tells what an ensemble does under it."""
