"""Measurements that take too long for continuous integration; `make bench` writes docs/benchmarks.md."""
