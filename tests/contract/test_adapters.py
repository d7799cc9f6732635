"""Saved adapters: one folder that PEFT and mlx-lm load as it is, bound to its base, refused when it does not fit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nestune.backends.adapter_config import CONFIG
from nestune.backends.adapters import METADATA, MLX_WEIGHTS, WEIGHTS
from nestune.backends.base import Backend
from nestune.base_model import resolve_base
from nestune.config import ModelConfig
from nestune.errors import ConfigError
from nestune.files import sha256_file
from nestune.tiers.schedule import TierSchedule
from tests.contract.conftest import BASE, MakeBackend, random_batch

PROMPTS = [[5, 17, 30], [7, 9, 11, 13, 40]]
TOKENS = list(range(3, 300, 7))
LAYERS = 6
# Rounding of sums in another order stays below; an adapter that trained for eight steps moves logits by more than 0.1.
SAME_LOGITS = 1e-4

Logits = NDArray[np.float32]


@pytest.fixture
def trained(make: MakeBackend) -> Backend:
    backend = make()
    for step in range(1, 9):
        backend.train_step([random_batch(step)], frozenset({0, 1, 2}), 5e-3)
    return backend


@pytest.fixture
def saved(trained: Backend, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    trained.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def of_mlx_lm(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Adapters that mlx-lm's own command line trained, by how many layers, -1 being all."""
    pytest.importorskip("mlx_lm")
    home = tmp_path_factory.mktemp("mlx-lm")
    rows = [{"text": f"The answer to question {number} is {number * number}."} for number in range(8)]
    for file in ("train.jsonl", "valid.jsonl"):
        (home / file).write_text("\n".join(map(json.dumps, rows)))
    folders = {-1: home / "all-layers", 2: home / "last-layers"}
    train = ["lora", "--train", "--model", str(BASE), "--data", str(home), "--learning-rate", "5e-3"]
    few = ["--iters", "6", "--batch-size", "2", "--val-batches", "1"]
    runs = [
        [*train, *few, "--num-layers", str(layers), "--adapter-path", str(folder)] for layers, folder in folders.items()
    ]
    program = (
        "import sys\n"
        "from nestune.backends.mlx_blas import load_fast_blas\n"
        "load_fast_blas()\n"
        "from mlx_lm.lora import main\n"
        f"for sys.argv in {runs!r}:\n"
        "    main()\n"
    )
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folders


def peft_logits(adapter: Path | None) -> Logits:
    """What plain Transformers and PEFT answer; None: the base alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model.eval()(torch.tensor([TOKENS])).logits[0].numpy())


def mlx_lm_logits(adapter: Path | None) -> Logits:
    """What plain mlx-lm answers; None: the base alone."""
    pytest.importorskip("mlx_lm")
    from nestune.backends.mlx_blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    from mlx_lm import load

    model = load(str(BASE), adapter_path=str(adapter) if adapter else None)[0]
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@pytest.mark.parametrize("library_logits", [peft_logits, mlx_lm_logits])
@pytest.mark.parametrize("strategy", ["layer_depth_reversed", "stacked"])
def test_one_folder_gives_peft_and_mlx_lm_the_logits_of_the_backend(
    make: MakeBackend, tmp_path: Path, strategy: str, library_logits: Callable[[Path | None], Logits]
) -> None:
    backend = make(tiers={"strategy": strategy, "update_every": [1, 2, 4]}, lora={"rank": 6, "alpha": 20.0})
    schedule = TierSchedule((1, 2, 4))
    for step in range(1, 9):
        backend.train_step([random_batch(step)], schedule.due(step), 5e-3)
    backend.save_adapter(tmp_path)
    ours, theirs = backend.logits(TOKENS), library_logits(tmp_path)
    print(f"\n{backend.name}, {strategy}, {library_logits.__name__}: deviation {np.abs(ours - theirs).max():.1e}")
    assert np.abs(ours - theirs).max() < SAME_LOGITS
    assert np.abs(theirs - library_logits(None)).max() > 0.1


@pytest.mark.parametrize("layers", [-1, 2])
def test_an_adapter_of_mlx_lms_own_command_line_gives_the_logits_that_mlx_lm_gives(
    make: MakeBackend, of_mlx_lm: dict[int, Path], layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = of_mlx_lm[layers]
    assert not (folder / WEIGHTS).exists()
    # mlx-lm's defaults: rank 8, scale 20.
    backend = make(lora={"rank": 8, "alpha": 160.0})
    untrained = backend.logits(TOKENS)
    backend.load_adapter(folder)
    ours, theirs = backend.logits(TOKENS), mlx_lm_logits(folder)
    print(f"\n{backend.name}, mlx-lm's own adapter, {layers} layers: deviation {np.abs(ours - theirs).max():.1e}")
    assert np.abs(ours - theirs).max() < SAME_LOGITS
    assert np.abs(ours - untrained).max() > 0.1
    assert ("layers 0 to 3 start untrained" in caplog.text) == (layers == 2)
    assert backend.weights().keys() == {p.name for p in backend.lora_parameters()}


def test_training_goes_on_from_an_adapter_of_mlx_lms_last_layers_in_all_of_them(
    make: MakeBackend, of_mlx_lm: dict[int, Path], tmp_path: Path
) -> None:
    backend = make(lora={"rank": 8, "alpha": 160.0})
    backend.load_adapter(of_mlx_lm[2])
    before = backend.weights()
    backend.train_step([random_batch(1)], frozenset({0, 1, 2}), 1e-3)
    moved = {name for name, values in backend.weights().items() if not np.array_equal(values, before[name])}
    # Where B is still zero, A has no gradient yet.
    assert moved == {p.name for p in backend.lora_parameters() if p.side == "b" or p.layer >= LAYERS - 2}
    backend.save_adapter(tmp_path)
    np.testing.assert_allclose(mlx_lm_logits(tmp_path), backend.logits(TOKENS), atol=SAME_LOGITS)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_pefts_own_is_taken_where_it_is_plain_lora(
    make: MakeBackend, tmp_path: Path, use_dora: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    targets = ["q_proj", "down_proj"]
    peft = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, use_dora=use_dora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), peft).save_pretrained(tmp_path)
    backend = make(lora={"rank": 4, "alpha": 8, "targets": targets})
    if use_dora:
        with pytest.raises(ConfigError, match=r"(?s)use_dora: nestune.*lora_magnitude_vector.* is no LoRA matrix"):
            backend.load_adapter(tmp_path)
    else:
        backend.load_adapter(tmp_path)
        np.testing.assert_allclose(backend.logits(TOKENS), peft_logits(tmp_path), atol=SAME_LOGITS)


def test_another_scale_of_mlx_lms_is_refused_with_the_alpha_to_set(
    make: MakeBackend, of_mlx_lm: dict[int, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"1 fault\(s\)\n.*is 160, lora\.alpha is 16: set lora\.alpha to 160"):
        make(lora={"rank": 8, "alpha": 16.0}).load_adapter(of_mlx_lm[-1])


@pytest.mark.parametrize("both", [True, False])
def test_an_adapter_of_other_targets_is_refused_with_what_to_set(make: MakeBackend, saved: Path, both: bool) -> None:
    if not both:
        (saved / WEIGHTS).unlink()
    all_linear = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ConfigError, match=rf"lora\.targets is \[q_proj\], but .*set lora\.targets to \[{all_linear}\]"):
        make(lora={"targets": ["q_proj"]}).load_adapter(saved)
    make(lora={"targets": all_linear.split(", ")}).load_adapter(saved)


def test_only_lora_matrices_are_saved(trained: Backend, saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    assert len(weights) == len(trained.lora_parameters()) == 6 * 7 * 2
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in weights)
    assert {key.rpartition(".")[2] for key in load_file(saved / MLX_WEIGHTS)} == {"lora_a", "lora_b"}
    config = json.loads((saved / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert (config["num_layers"], config["lora_parameters"]["scale"]) == (LAYERS, 2)


def test_training_leaves_the_base_untouched(make: MakeBackend) -> None:
    before = sha256_file(BASE / "model.safetensors")
    backend = make()
    batch = random_batch(99)
    untrained = backend.loss([batch]).nats
    backend.train_step([random_batch(1)], frozenset({0, 1, 2}), 5e-3)
    assert backend.loss([batch]).nats != untrained
    backend.load_adapter(None)
    assert backend.loss([batch]).nats == untrained
    assert sha256_file(BASE / "model.safetensors") == before


def test_a_loaded_adapter_has_the_bits_that_were_saved(trained: Backend, saved: Path, make: MakeBackend) -> None:
    other = make(training={"seed": 1})
    other.load_adapter(saved)
    assert {n: w.tobytes() for n, w in other.weights().items()} == {
        n: w.tobytes() for n, w in trained.weights().items()
    }
    assert other.generate(PROMPTS, 5) == trained.generate(PROMPTS, 5)


def test_saving_twice_gives_the_same_bytes(trained: Backend, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    trained.save_adapter(again)
    for file in (WEIGHTS, MLX_WEIGHTS, CONFIG):
        assert sha256_file(again / file) == sha256_file(saved / file)


def write_base(folder: Path, sha256: str) -> None:
    (folder / METADATA).write_text(json.dumps({"base": {"reference": "demo/base", "sha256": sha256}}))


def test_an_adapter_of_another_base_is_refused(trained: Backend, saved: Path) -> None:
    write_base(saved, "0" * 64)
    with pytest.raises(ConfigError, match=r"(?s)it was trained on demo/base .*Use the base and the lora block"):
        trained.load_adapter(saved)


def test_an_adapter_of_this_base_is_taken(trained: Backend, saved: Path) -> None:
    write_base(saved, resolve_base(ModelConfig(base=str(BASE))).sha256)
    trained.load_adapter(saved)
    assert trained.weights().keys() == {p.name for p in trained.lora_parameters()}


def test_every_mismatch_is_told_at_once(trained: Backend, saved: Path) -> None:
    (saved / MLX_WEIGHTS).unlink()
    weights = load_file(saved / WEIGHTS)
    first, second, *_ = sorted(weights)
    del weights[first]
    weights[second] = np.zeros((3, 3), np.float32)
    weights["base_model.model.surplus"] = np.zeros(1, np.float32)
    save_file(weights, saved / WEIGHTS)
    edit_config(saved, r=4, lora_parameters={"rank": 4, "scale": 4.0}, use_dora=True)
    write_base(saved, "0" * 64)
    with pytest.raises(ConfigError) as caught:
        trained.load_adapter(saved)
    text = str(caught.value)
    assert "6 fault(s)" in text
    assert "use_dora: nestune trains plain LoRA" in text
    assert "its rank is 4, lora.rank is 8: set lora.rank to 4" in text
    assert "it was trained on demo/base" in text
    assert "layers.0.mlp.down_proj.lora_a is missing" in text
    assert "layers.0.mlp.down_proj.lora_b has shape [3, 3], expected [96, 8]" in text
    assert "base_model.model.surplus is no LoRA matrix of a layer" in text


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_refused_adapter_leaves_the_weights_as_they_were(trained: Backend, saved: Path) -> None:
    before = trained.logits(TOKENS)
    edit_config(saved, use_dora=True)
    with pytest.raises(ConfigError):
        trained.load_adapter(saved)
    np.testing.assert_array_equal(trained.logits(TOKENS), before)


@pytest.mark.parametrize("file", [WEIGHTS, MLX_WEIGHTS])
def test_a_file_that_one_library_replaced_is_refused(trained: Backend, saved: Path, file: str) -> None:
    weights = load_file(saved / file)
    save_file({key: values * np.float32(2) for key, values in weights.items()}, saved / file)
    with pytest.raises(ConfigError, match=rf"differ in {len(weights)} matrices, .*delete {MLX_WEIGHTS} to use"):
        trained.load_adapter(saved)


@pytest.mark.parametrize("file", [WEIGHTS, MLX_WEIGHTS])
def test_a_truncated_file_is_refused(trained: Backend, saved: Path, file: str) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=f"the adapter is broken: {file}"):
        trained.load_adapter(saved)


def test_a_folder_that_is_no_adapter_is_refused(trained: Backend, saved: Path) -> None:
    shutil.rmtree(saved)
    with pytest.raises(ConfigError, match="is no adapter: it needs"):
        trained.load_adapter(saved)


def test_answers_of_a_batch_equal_those_of_each_prompt_alone(trained: Backend) -> None:
    assert trained.generate(PROMPTS, 6) == [trained.generate([prompt], 6)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("others", [[], ["q_proj"]])
def test_a_target_that_matches_nothing_is_refused_with_the_known_modules(make: MakeBackend, others: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets.* called nothing_like_it\. .*down_proj.*q_proj"):
        make(lora={"targets": [*others, "nothing_like_it"]})


def test_a_rank_that_no_weight_can_have_is_refused_before_memory_is_taken(make: MakeBackend) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank is 1000000000, .* a higher rank than 96\. Set it to 96 or less"):
        make(lora={"rank": 1_000_000_000})
    with pytest.raises(ConfigError, match=r"lora\.rank is 97,"):
        make(lora={"rank": 97})
    assert make(lora={"rank": 96, "targets": ["q_proj"]}).lora_parameters()[0].rank == 96


def test_a_target_outside_of_the_layers_is_refused(make: MakeBackend, tmp_path: Path) -> None:
    # With a head of its own, which a head that is tied to the embeddings is not for every library.
    base = shutil.copytree(BASE, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    save_file(weights | head, base / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match="no LoRA matrix of a layer"):
        make(base=base, lora={"targets": ["lm_head", "q_proj"]})
