"""The model that a registered version is: MLflow copies this file into it and runs it when the version is loaded.

    mlflow.pyfunc.load_model("models:/nestune@champion").predict(["What is the capital of France?"])

A version holds the adapter only. Its base is found by the reference it was trained with, or by the folder in
the environment variable NESTUNE_BASE, and must be, by content, the one that the adapter was trained on. It answers
with PyTorch or with MLX, whichever `model.backend: auto` takes here; which of them trained it does not matter.
"""

import os
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ServedAdapter(PythonModel):  # type: ignore[misc]
    """Answers user prompts with the base model and the adapter of this version."""

    def load_context(self, context: Any) -> None:
        """Load the base and put the adapter on it; raises ConfigError when it is not the adapter's base."""
        from nestune.backends.factory import make_backend
        from nestune.config import RunConfig
        from nestune.data.tokens import load_tokenizer

        settings, adapter = context.model_config, context.artifacts["adapter"]
        folder = _find_base(settings)
        # What decides the answers, as in the evaluation; no data is read.
        config = RunConfig.model_validate(
            {
                "name": "served",
                "model": {"base": str(folder), "dtype": settings["dtype"]},
                "lora": settings["lora"],
                "training": {"precision": settings["precision"]},
                "data": {"train": adapter},
            }
        )
        self._max_new_tokens = int(settings["max_new_tokens"])
        self._tokenizer = load_tokenizer(folder)
        self._backend = make_backend(config)
        self._backend.show_adapter(Path(adapter))

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        """The greedy answer to each prompt, whatever else is asked."""
        from nestune.evaluation.answers import answer

        return [answer(self._backend, self._tokenizer, prompt, self._max_new_tokens) for prompt in model_input]


def _find_base(settings: Any) -> Any:
    """The folder of the base that the adapter was trained on."""
    from nestune.base_model import resolve_base
    from nestune.config import ModelConfig
    from nestune.errors import ConfigError

    override = os.environ.get("NESTUNE_BASE")
    named = override or settings["base"]
    remedy = "Set NESTUNE_BASE to the folder of the base it was trained on, or start where that path leads to it."
    try:
        base = resolve_base(ModelConfig(base=named, revision=None if override else settings["revision"]))
    except ConfigError as error:
        raise ConfigError(f"the base of this adapter is not here: {error} {remedy}") from None
    if base.sha256 != settings["base_sha256"]:
        raise ConfigError(
            f"this adapter was trained on {settings['base']} (sha256 {settings['base_sha256'][:12]}); {named} is "
            f"another model (sha256 {base.sha256[:12]}). {remedy}"
        )
    return base.folder


set_model(ServedAdapter())
