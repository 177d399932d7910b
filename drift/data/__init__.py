"""Images and latents on disk, and what the trainers draw from them."""

import drift.data.mnist  # noqa: F401  (registers its data sets)
