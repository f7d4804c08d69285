"""Programs that look for input which breaks a promise; the unit tests run each for a moment."""
