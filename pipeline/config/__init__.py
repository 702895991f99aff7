"""One frozen dataclass per command, and the YAML file that fills them.

Each field carries its help text: the single source of the command line, the YAML keys and the
documentation. A file has `task:` and `data:` at the top, shared by all commands, and a section per
command:

    task: sequence-classification
    data: {dataset: data/bbc}
    cache-logits: {teacher: runs/teacher, output: runs/cache}

Precedence: flag, then the command's section, then the shared part, then the default. Unknown keys
are errors.
"""

from pipeline.config.caches import AuditConfig, ImportConfig, InspectConfig, VerifyConfig
from pipeline.config.capture import CacheLogitsConfig, EstimateConfig, TrainTeacherConfig, judging_of, make_encoding
from pipeline.config.data import DataConfig, chat_template_kwargs
from pipeline.config.evaluation import EvaluateConfig, PredictConfig
from pipeline.config.file import ConfigFile, cli_fields, load_config, resolve
from pipeline.config.generation import GenerateConfig
from pipeline.config.options import flag_name, parse_bytes
from pipeline.config.report import ReportConfig
from pipeline.config.rounds import Step, sections_for, steps_of, through_stage
from pipeline.config.sections import SECTIONS, STAGES
from pipeline.config.sharing import PullConfig, PushConfig
from pipeline.config.starter import InitConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import InitStudentConfig, TrainStudentConfig
from pipeline.config.transforms import ConvertConfig, FilterConfig, MergeConfig

__all__ = [
    "SECTIONS",
    "STAGES",
    "AuditConfig",
    "CacheLogitsConfig",
    "ConfigFile",
    "ConvertConfig",
    "DataConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "FilterConfig",
    "GenerateConfig",
    "ImportConfig",
    "InitConfig",
    "InitStudentConfig",
    "InspectConfig",
    "MergeConfig",
    "PredictConfig",
    "PullConfig",
    "PushConfig",
    "ReportConfig",
    "Step",
    "SweepConfig",
    "TrainStudentConfig",
    "TrainTeacherConfig",
    "VerifyConfig",
    "chat_template_kwargs",
    "cli_fields",
    "flag_name",
    "judging_of",
    "load_config",
    "make_encoding",
    "parse_bytes",
    "resolve",
    "sections_for",
    "steps_of",
    "through_stage",
]
