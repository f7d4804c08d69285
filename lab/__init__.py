"""Disposable hosts, and the tailnet to try things on."""
