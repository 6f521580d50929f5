"""The configuration, from one place: the tree, its sections, and nothing else."""

from penstock.config.agent import AgentSection
from penstock.config.data import (
    ColumnsSection,
    CurriculumSection,
    DataSection,
    DatasetSection,
    TrainingSet,
    TrainSetSection,
)
from penstock.config.evaluation import EvalSampling, EvalSection, EvalSetSection, HeldOutSet
from penstock.config.loss import LossSection
from penstock.config.ray import RaySection
from penstock.config.services import (
    EngineSection,
    LogSection,
    RedisSection,
    RewardSection,
    RolloutSection,
    TrackingSection,
    TrainerSection,
    WeightsSection,
)
from penstock.config.slurm import SlurmComponentSection, SlurmSection
from penstock.config.training import (
    ActorSection,
    CheckpointSection,
    LoraSection,
    OptimizerSection,
    RefSection,
    RunSection,
    SamplingSection,
    StalenessSection,
    TeacherSection,
)
from penstock.config.tree import Config
from penstock.config.types import Section

__all__ = [
    "ActorSection",
    "AgentSection",
    "CheckpointSection",
    "ColumnsSection",
    "Config",
    "CurriculumSection",
    "DataSection",
    "DatasetSection",
    "EngineSection",
    "EvalSampling",
    "EvalSection",
    "EvalSetSection",
    "HeldOutSet",
    "LogSection",
    "LoraSection",
    "LossSection",
    "OptimizerSection",
    "RaySection",
    "RedisSection",
    "RefSection",
    "RewardSection",
    "RolloutSection",
    "RunSection",
    "SamplingSection",
    "Section",
    "SlurmComponentSection",
    "SlurmSection",
    "StalenessSection",
    "TeacherSection",
    "TrackingSection",
    "TrainSetSection",
    "TrainerSection",
    "TrainingSet",
    "WeightsSection",
]
