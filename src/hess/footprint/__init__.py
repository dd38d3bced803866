"""What a model needs on a machine, before it is run: memory, work and time."""

from hess.footprint.estimate import Footprint, estimate_footprint, most_views
from hess.footprint.speedup import predict_speedups
from hess.footprint.throughput import Throughput, measure_throughput

__all__ = [
    "Footprint",
    "Throughput",
    "estimate_footprint",
    "measure_throughput",
    "most_views",
    "predict_speedups",
]
