"""Sinkhorn drifting on latents of faces (arXiv 2603.12366, section 5.4)."""
