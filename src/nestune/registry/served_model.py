"""The model that a registered version is: MLflow copies this file into it and runs it when the version is loaded.

    mlflow.pyfunc.load_model("models:/nestune@champion").predict(["What is the capital of France?"])

A version holds the adapter only. Its base is found by the reference it was trained with, or by the folder in
the environment variable NESTUNE_BASE, and must be, by content, the one that the adapter was trained on.
"""

import os
import warnings
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class ServedAdapter(PythonModel):  # type: ignore[misc]
    """Answers user prompts with the base model and the adapter of this version."""

    def load_context(self, context: Any) -> None:
        """Load the base and put the adapter on it; raises ConfigError when it is not the adapter's base."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from nestune.backends.torch_backend import greedy_generation
        from nestune.data.tokens import load_tokenizer

        settings = context.model_config
        folder = _find_base(settings)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._max_new_tokens = int(settings["max_new_tokens"])
        self._tokenizer = load_tokenizer(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=settings["dtype"])
        # As in the evaluation, so that a version answers as it was scored.
        base.generation_config = greedy_generation(base.generation_config, self._tokenizer)
        with warnings.catch_warnings():
            # PEFT asks Transformers in ways that Transformers has begun to rename; callers can do nothing about it.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base, context.artifacts["adapter"])
        self._model = model.to(self._device).eval()

    def predict(self, context: Any, model_input: list[str]) -> list[str]:
        """The greedy answer to each prompt.

        Prompts are answered one by one, so that an answer does not depend on what else is asked.
        """
        return [self._answer(prompt) for prompt in model_input]

    def _answer(self, prompt: str) -> str:
        import torch

        tokenizer = self._tokenizer
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
        with torch.no_grad():
            written = self._model.generate(
                input_ids=tokens.to(self._device),
                attention_mask=torch.ones_like(tokens).to(self._device),
                max_new_tokens=self._max_new_tokens,
            )
        return str(tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)).strip()


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
