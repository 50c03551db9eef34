"""What a trial samples of its machine, beside MLflow's own monitors."""

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from sweeps.cluster.system import sample


def test_names_and_units_are_mlflows_own():
    monitor = CPUMonitor()
    monitor.collect_metrics()
    theirs = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
    ours = sample()
    assert theirs.keys() <= ours.keys()
    memory = "system/system_memory_usage_megabytes"
    assert abs(ours[memory] - theirs[memory]) < 0.1 * theirs[memory] + 500
    assert 0 <= ours["system/cpu_utilization_percentage"] <= 100
