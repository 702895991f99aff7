"""One frozen dataclass per command, and the YAML file that fills them.

Each field carries its help text, so that the command line, the YAML keys and the documentation have one source.
A file has `task:` and `data:` at the top, shared by all commands, and a section per command:

    task: sequence-classification
    data: {dataset: data/bbc}
    cache-logits: {teacher: runs/teacher, output: runs/cache}

Precedence: flag, then the command's section, then the shared part, then the default. Unknown keys are errors.
"""

from pipeline.config.caches import AuditConfig, ImportConfig, InspectConfig, VerifyConfig
from pipeline.config.capture import CacheLogitsConfig, EstimateConfig, TrainTeacherConfig, make_encoding
from pipeline.config.data import DataConfig
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.file import ConfigFile, cli_fields, load_config, resolve
from pipeline.config.options import parse_bytes
from pipeline.config.sections import SECTIONS, STAGES
from pipeline.config.training import InitStudentConfig, TrainStudentConfig

__all__ = [
    "SECTIONS",
    "STAGES",
    "AuditConfig",
    "CacheLogitsConfig",
    "ConfigFile",
    "DataConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ImportConfig",
    "InitStudentConfig",
    "InspectConfig",
    "TrainStudentConfig",
    "TrainTeacherConfig",
    "VerifyConfig",
    "cli_fields",
    "load_config",
    "make_encoding",
    "parse_bytes",
    "resolve",
]
