"""torch-fidelity's functions on features; importing it imports torchvision."""

from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()

from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import calculate_precision_recall_full  # noqa: E402

__all__ = ["calculate_precision_recall_full", "isc_features_to_metric"]
