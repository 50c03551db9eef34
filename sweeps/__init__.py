"""Many runs: a table of the paper becomes trials, Ray Tune runs them, MLflow records them."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# `sweeps.tracking` repeats what failed. MLflow would repeat every call for minutes, and make a run twice when only the
# answer was lost.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
