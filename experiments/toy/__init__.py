"""The 2-D experiments of Sinkhorn drifting (arXiv 2603.12366, section 5.2); README.md has the command."""

import stages  # noqa: F401  how long OpenMP's threads spin, for experiments as for stages
