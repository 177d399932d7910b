"""Measuring a generator: samples, features, Fréchet distance, pictures. Import from the modules."""
