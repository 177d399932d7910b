"""Sinkhorn drifting's temperature sweep on MNIST (arXiv 2603.12366, section 5.3)."""
