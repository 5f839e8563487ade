"""One file per question; each is a command and a Python call."""
