"""Which commands a file may have sections for."""

from __future__ import annotations

from pipeline.config.caches import AuditConfig, ImportConfig, InspectConfig, VerifyConfig
from pipeline.config.capture import CacheLogitsConfig, EstimateConfig, TrainTeacherConfig
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.predict import PredictConfig
from pipeline.config.report import ReportConfig
from pipeline.config.sharing import PullConfig, PushConfig
from pipeline.config.sweep import SweepConfig
from pipeline.config.training import InitStudentConfig, TrainStudentConfig
from pipeline.config.transforms import ConvertConfig, FilterConfig, MergeConfig

#: What `run` runs, in this order.
STAGES: dict[str, type] = {
    "train-teacher": TrainTeacherConfig,
    "cache-logits": CacheLogitsConfig,
    "init-student": InitStudentConfig,
    "train-student": TrainStudentConfig,
    "evaluate": EvaluateConfig,
}

#: Every command that a YAML file may have a section for.
SECTIONS: dict[str, type] = {
    **STAGES,
    "estimate": EstimateConfig,
    "verify": VerifyConfig,
    "audit": AuditConfig,
    "inspect": InspectConfig,
    "import": ImportConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "report": ReportConfig,
    "predict": PredictConfig,
    "sweep": SweepConfig,
    "merge": MergeConfig,
    "filter": FilterConfig,
    "convert": ConvertConfig,
}
