"""MLflow: runs are tracked, adapters registered, promoted by alias, and served."""
