"""Measuring: latency with intervals, accuracy of real artifacts, the environment they were measured in."""
