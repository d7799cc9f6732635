"""The configuration of a run: its blocks and their defaults, and how it is read."""

from nestune.config.blocks import (
    DataConfig,
    DvcConfig,
    EarlyStopping,
    LoraConfig,
    ModelConfig,
    RegistryConfig,
    RunConfig,
    TrainingConfig,
)
from nestune.config.evaluation import EvaluationConfig, GateConfig, LmEvalConfig
from nestune.config.files import dump_config, load_config, parse_config
from nestune.config.retention import (
    KlConfig,
    PromptsConfig,
    ReplayConfig,
    RetentionConfig,
    SelfWrittenConfig,
    StrengthConfig,
    change_recipe,
)
from nestune.config.tiers import ImportanceConfig, TierConfig

__all__ = [
    "DataConfig",
    "DvcConfig",
    "EarlyStopping",
    "EvaluationConfig",
    "GateConfig",
    "ImportanceConfig",
    "KlConfig",
    "LmEvalConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "RegistryConfig",
    "ReplayConfig",
    "RetentionConfig",
    "RunConfig",
    "SelfWrittenConfig",
    "StrengthConfig",
    "TierConfig",
    "TrainingConfig",
    "change_recipe",
    "dump_config",
    "load_config",
    "parse_config",
]
