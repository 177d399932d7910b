"""The two training loops and what they share."""


def __getattr__(name: str):
    # Loaded when asked for, so that importing one module of the package does not import them all
    if name == "drift_objective":
        from drift.training.objective import drift_objective

        return drift_objective
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
