"""Images and latents on disk, and what the trainers draw from them."""
