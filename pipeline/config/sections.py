"""The commands that a YAML file may have sections for."""

from __future__ import annotations

from pipeline.config.caches import AuditConfig, ImportConfig, InspectConfig, VerifyConfig
from pipeline.config.capture import CacheLogitsConfig, EstimateConfig, TrainTeacherConfig
from pipeline.config.evaluation import EvaluateConfig, PredictConfig
from pipeline.config.generation import GenerateConfig
from pipeline.config.report import ReportConfig
from pipeline.config.sharing import PullConfig, PushConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import InitStudentConfig, TrainStudentConfig
from pipeline.config.transforms import ConvertConfig, FilterConfig, MergeConfig

#: All commands that a YAML file may have a section for, in the order of their use.
SECTIONS: dict[str, type] = {
    "train-teacher": TrainTeacherConfig,
    "generate": GenerateConfig,
    "estimate": EstimateConfig,
    "cache-logits": CacheLogitsConfig,
    "import": ImportConfig,
    "inspect": InspectConfig,
    "verify": VerifyConfig,
    "audit": AuditConfig,
    "merge": MergeConfig,
    "filter": FilterConfig,
    "convert": ConvertConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "init-student": InitStudentConfig,
    "train-student": TrainStudentConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "predict": PredictConfig,
}

#: The stages of `run`, in order.
STAGES: dict[str, type] = {
    name: SECTIONS[name]
    for name in ("train-teacher", "generate", "cache-logits", "init-student", "train-student", "evaluate", "report")
}
