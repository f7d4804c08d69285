"""`quietport doctor`: is this host what it was declared to be, and what to do where it is not."""
