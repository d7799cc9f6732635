"""The configuration of a run: its blocks and their defaults, and how it is read."""

from nestune.config.blocks import (
    DataConfig,
    EarlyStopping,
    EvaluationConfig,
    GateConfig,
    ImportanceConfig,
    LoraConfig,
    ModelConfig,
    RegistryConfig,
    ReplayConfig,
    RetentionConfig,
    RunConfig,
    TierConfig,
    TrainingConfig,
)
from nestune.config.files import dump_config, load_config, parse_config

__all__ = [
    "DataConfig",
    "EarlyStopping",
    "EvaluationConfig",
    "GateConfig",
    "ImportanceConfig",
    "LoraConfig",
    "ModelConfig",
    "RegistryConfig",
    "ReplayConfig",
    "RetentionConfig",
    "RunConfig",
    "TierConfig",
    "TrainingConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
