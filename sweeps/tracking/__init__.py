"""A sweep in MLflow: `tracker` is told, `journal` keeps, `recorder` writes."""
