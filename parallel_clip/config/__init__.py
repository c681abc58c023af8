"""The config of a run. Everything outside this folder imports from here."""

from parallel_clip.config.blends import Blend, TrainingSources, training_sources
from parallel_clip.config.keys import (
    BadSteps,
    Config,
    Data,
    DataSource,
    Ema,
    Freeze,
    Init,
    LearningRateSchedule,
    Loss,
    Optimizer,
    Parallel,
    PartlyFrozen,
    Phase,
    Stages,
    Train,
    Until,
    parse_bytes,
    parse_seconds,
)
from parallel_clip.config.load import config_from_dict, load_config
from parallel_clip.config.phases import boundaries, parse_until
from parallel_clip.config.resume import is_allowed, resume_differences

__all__ = [
    "BadSteps",
    "Blend",
    "Config",
    "Data",
    "DataSource",
    "Ema",
    "Freeze",
    "Init",
    "Optimizer",
    "Parallel",
    "PartlyFrozen",
    "Phase",
    "LearningRateSchedule",
    "Loss",
    "Stages",
    "Train",
    "TrainingSources",
    "Until",
    "boundaries",
    "parse_bytes",
    "parse_seconds",
    "parse_until",
    "config_from_dict",
    "load_config",
    "is_allowed",
    "resume_differences",
    "training_sources",
]
