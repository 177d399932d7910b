"""Looks at latents and at the MAE before a night is spent on them: pictures for the eye, numbers, warnings.

`latents.inspect_latents` and `mae.inspect_mae` write pictures and a `meta.json` that says what they were made
from. Both check all that they read first, so that what is wrong leaves nothing behind.
"""
