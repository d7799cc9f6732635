"""LoRA on an MLX model: which modules get an adapter, the layer itself, and layers that keep no activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from nestune.backends.lora_parts import LoraParts
from nestune.backends.lora_targets import chosen_modules
from nestune.config import LoraConfig
from nestune.errors import ConfigError
from nestune.tiers.parameters import LoraParameter, parse_parameter

# GPT-NeoX has names of its own.
ROPE_IN_MLX = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}


# A (inputs, rank), B (rank, outputs) and the scale of a frozen adapter in one module.
Part = tuple[mx.array, mx.array, float]


class LoraLinear(nn.Module):
    """W x + scale (x A) B around a frozen linear module, quantized or not; A (inputs, rank), B (rank, outputs).

    A frozen parent's adapter, s_p (x A_p) B_p, may join, or take the place of the trained one (`LoraParts`).

    Differs from mlx-lm's in three things: dropout draws from a key of the module's own, so that a layer computed
    again in the backward pass drops the same inputs; the adapter's product is added as it is made; no weights are
    drawn, since every backend starts from the same ones.
    """

    def __init__(self, linear: nn.Module, lora: LoraConfig, parts: LoraParts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        outputs, inputs = _shape(linear)
        self.linear = linear
        self.lora_a = mx.zeros((inputs, lora.rank))
        self.lora_b = mx.zeros((lora.rank, outputs))
        # A leading underscore keeps it out of the parameters.
        self._key = mx.random.key(0)
        self._scale = lora.alpha / lora.rank
        self._keep = 1 - lora.dropout
        self._parts = parts
        self._parent: Part | None = None

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = self.linear(x)
        parent = self._parent if self._parts.with_parent else None
        if not self._parts.own:
            return output if parent is None else _add(output, x, *parent)
        if self.training and self._keep < 1:
            output = output if parent is None else _add(output, x, *parent)
            x = x * mx.random.bernoulli(self._keep, x.shape, key=self._key) * (1 / self._keep)
            return _add(output, x, self.lora_a, self.lora_b, self._scale)
        if parent is None:
            return _add(output, x, self.lora_a, self.lora_b, self._scale)
        # As one adapter, whose product costs little more than that of one of them.
        a, b, scale = parent
        b = b if scale == self._scale else b * (scale / self._scale)
        side_by_side = mx.concatenate([a, self.lora_a], axis=1), mx.concatenate([b, self.lora_b])
        return _add(output, x, *side_by_side, self._scale)

    def set_parent(self, parent: "Part | None") -> None:
        """Compute, from now on, with this adapter as the parent's."""
        self._parent = parent

    def drop_by(self, key: mx.array) -> None:
        """Drop, from now on, the inputs that this key draws."""
        self._key = key


def _add(output: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """The output, and scale (x A) B."""
    inner = x @ a
    if inner.dtype == output.dtype:
        return mx.addmm(output, inner, b, alpha=scale)
    return output + (scale * (inner @ b)).astype(output.dtype)


@dataclass(frozen=True)
class LoraMatrix:
    """A matrix of the adapter: what it is (in PEFT's orientation), and the module that holds its transpose."""

    described: LoraParameter
    path: str
    module: LoraLinear

    def put(self, values: mx.array) -> None:
        """Let the module compute with these values."""
        self.module[f"lora_{self.described.side}"] = values

    def differentiate(self, wanted: bool) -> None:
        """Whether its gradient is asked for: a layer that is computed again makes no other."""
        change = self.module.unfreeze if wanted else self.module.freeze
        change(recurse=False, keys=[f"lora_{self.described.side}"])

    @property
    def values(self) -> mx.array:
        """What the module computes with."""
        values: mx.array = self.module[f"lora_{self.described.side}"]
        return values


def parameters_of(model: nn.Module, *, frozen_too: bool = False) -> dict[str, mx.array]:
    """The trainable parameters, or all of them, by their paths, in the model's order."""
    parameters = model.parameters() if frozen_too else model.trainable_parameters()  # type: ignore[no-untyped-call]
    return dict(tree_flatten(parameters))


def add_lora(model: nn.Module, lora: LoraConfig, parts: LoraParts) -> list[LoraMatrix]:
    """Freeze the model and give its linear modules an adapter; the matrices in the model's order.

    Raises ConfigError when the targets match nothing, or a module outside of the layers.
    """
    model.freeze()
    linear = {path: module for path, module in _modules(model) if isinstance(module, _LINEAR)}
    chosen = chosen_modules(lora, {path: min(_shape(module)) for path, module in linear.items()})
    outside = [path for path in chosen if parse_parameter(f"{path}.lora_a", ()) is None]
    if outside:
        raise ConfigError(
            f"lora.targets is {lora.targets!r}: that is no LoRA matrix of a layer: {', '.join(outside)}. Let LoRA "
            "target modules of the layers by name, e.g. [q_proj, v_proj]."
        )
    with_adapter = {path: LoraLinear(linear[path], lora, parts) for path in chosen}
    model.update_modules(tree_unflatten(list(with_adapter.items())))
    for module in with_adapter.values():
        module.unfreeze(recurse=False, keys=["lora_a", "lora_b"])
    matrices = []
    for key, values in parameters_of(model).items():
        described = parse_parameter(key, values.shape[::-1])
        assert described is not None
        path = key.rpartition(".")[0]
        matrices.append(LoraMatrix(described, path, with_adapter[path]))
    return matrices


def squared_change(
    matrices: Mapping[str, mx.array], modules: Mapping[str, LoraLinear], parts: LoraParts, scale: float
) -> mx.array:
    """The squared Frobenius norm of what training has changed of all weights against the parent; a scalar.

    matrices: canonical name -> A (inputs, rank) or B (rank, outputs); modules: canonical name -> what holds it. As
    `nestune.backends.torch_lora.squared_change`.
    """
    total = mx.zeros(())
    for name, a in matrices.items():
        if not name.endswith("lora_a"):
            continue
        b, parent = scale * matrices[name[:-1] + "b"], modules[name]._parent
        if parent is not None and not parts.with_parent:
            a, b = mx.concatenate([a, parent[0]], axis=1), mx.concatenate([b, -parent[2] * parent[1]])
        total = total + ((b @ b.T) * (a.T @ a)).sum()
    return total


def checkpoint_activations(layers: Sequence[nn.Module]) -> None:
    """Let each layer keep no activations for the backward pass, which computes them again.

    mlx-lm's own function changes the class, and so every model of that kind in the process.
    """
    for layer in layers:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (kind,), {"__call__": _checkpointed(kind)})


def mlx_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm's models must be told beside a config.json that Transformers 5 wrote.

    It keeps RoPE's settings in `rope_parameters`; mlx-lm reads them at the top level, and takes a default, silently,
    where they are not there.
    """
    rope = config.get("rope_parameters") or {}
    told: dict[str, Any] = {}
    # Gemma 3 rotates by another base in layers that see a window only.
    if "full_attention" in rope:
        told["rope_local_base_freq"] = rope.get("sliding_attention", rope["full_attention"])["rope_theta"]
        rope = rope["full_attention"]
    for key, names in ROPE_IN_MLX.items():
        told |= {name: rope[key] for name in names if key in rope}
    if rope.get("rope_type", "default") != "default":
        told["rope_scaling"] = rope
    # A model of text and pictures has its language model's settings one block deeper.
    if "text_config" in config:
        told["text_config"] = {**config["text_config"], **mlx_arguments(config["text_config"])}
    return {name: value for name, value in told.items() if name == "text_config" or config.get(name) is None}


_LINEAR = (nn.Linear, nn.QuantizedLinear)


def _shape(linear: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear module, quantized or not."""
    outputs, inputs = linear.weight.shape
    return outputs, linear.scales.shape[-1] * linear.group_size if isinstance(linear, nn.QuantizedLinear) else inputs


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    modules: list[tuple[str, nn.Module]] = model.named_modules()  # type: ignore[no-untyped-call]
    return modules


def _checkpointed(kind: type[nn.Module]) -> Any:
    """The call of a layer class that keeps only its inputs for the backward pass.

    Differs from `mx.checkpoint` in the order of that pass, which would have layers computed again before their turn,
    and the products that make the gradients of LoRA matrices last of all: what these are made of would stay for all
    layers.
    """

    def call(layer: Any, *inputs: Any, **options: Any) -> Any:
        if not layer.training:
            return kind.__call__(layer, *inputs, **options)
        matrices = parameters_of(layer)
        arrays = {place: given for place, given in enumerate(inputs) if isinstance(given, mx.array)}

        def compute(*values: mx.array) -> Any:
            layer.update(tree_unflatten(list(zip(matrices, values, strict=False))))
            given = dict(enumerate(inputs)) | dict(zip(arrays, values[len(matrices) :], strict=True))
            return kind.__call__(layer, *given.values(), **options)

        kept = mx.custom_function(compute)

        @kept.vjp
        def backward(values: Any, of_output: mx.array, _: mx.array) -> list[mx.array]:
            # One alone comes bare.
            values = [values] if isinstance(values, mx.array) else list(values)
            gradients = mx.vjp(compute, mx.depends(values, [of_output]), [of_output])[1]
            of_matrices, of_inputs = gradients[: len(matrices)], gradients[len(matrices) :]
            return of_matrices + (mx.depends(of_inputs, of_matrices) if of_matrices else of_inputs)

        return kept(*matrices.values(), *arrays.values())

    return call
