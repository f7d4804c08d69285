"""What can be seen of a host: one fact a file."""
