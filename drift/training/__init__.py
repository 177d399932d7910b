"""One training loop, the MAE and the generator."""


def __getattr__(name: str):
    if name == "drift_objective":  # imported when it is used: the mae stage needs nothing of it
        from drift.training.objective import drift_objective

        return drift_objective
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
