"""Many runs: a table of the paper becomes trials, Ray Tune runs them, MLflow records them."""
