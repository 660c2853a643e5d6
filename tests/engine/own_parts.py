"""A user's own module, named by its dotted path: a small family, an objective, a format."""

from dataclasses import dataclass, field, replace

from engine import config
from engine.data.formats import text
from engine.objectives import ObjectiveConfig
from engine.objectives.dpo import DPO
from engine.objectives.kto import KTO
from engine.objectives.pretrain import Pretrain
from engine.objectives.simpo import SimPO
from models.decoder import DecoderConfig
from models.families import llama3
from models.layers.rope import RopeConfig

TINY = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    rope=RopeConfig(theta=10_000.0),
    max_position_embeddings=128,
)

FAMILY = replace(llama3.FAMILY, name=__name__, hf_model_types=("own",), flavors={"tiny": TINY})


class Own(Pretrain):
    """Next-token prediction under a name of its own, beside objectives that read every key."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.others = DPO(config), SimPO(config), KTO(config)


def build(config: ObjectiveConfig) -> Own:
    """Return the objective."""
    return Own(config)


encode = text.encode


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnSection:
    """A user's section."""

    key: int = 1
    """A user's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig(config.JobConfig):
    """Every key, and a section more."""

    own: OwnSection = field(default_factory=OwnSection)
