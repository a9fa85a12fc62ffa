"""Monitoring of a run: gradients, loss spikes, lost ranks, requests to stop, throughput.

Must not know the training loop.
"""
