"""What happened: MLflow runs become data frames and the tables of the paper."""
