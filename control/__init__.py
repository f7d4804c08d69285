"""The operator's side: what a host is told, how it is reached, and the proof that it still can be."""
