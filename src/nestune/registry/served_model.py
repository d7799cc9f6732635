"""The model that a registered version is: MLflow copies this file into it and runs it when the version is loaded.

    mlflow.pyfunc.load_model("models:/nestune@champion").predict(["What is the capital of France?"])

What it does is in `nestune.registry.serving`, so that a newer nestune serves an older version with all that it mends.
"""

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from nestune.registry.serving import Serving


# MLflow checks what comes against the type hint of a `predict` that stands in this class itself, and would refuse
# {"messages": [...]}; that of a parent class checks for itself.
class ServedAdapter(Serving, PythonModel):  # type: ignore[misc]
    """Answers with the base model and the adapter of this version."""


set_model(ServedAdapter())
