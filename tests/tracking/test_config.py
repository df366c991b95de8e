from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from finetune.tracking import TrackerConfig

CONF = Path(__file__).parent.parent.parent / "conf"


@dataclass
class _Schema:
    tracking: dict[str, TrackerConfig] = field(default_factory=dict)


def _compose(tmp_path: Path, *overrides: str) -> dict[str, TrackerConfig]:
    (tmp_path / "tracking").symlink_to(CONF / "tracking")
    (tmp_path / "main.yaml").write_text("defaults: [schema_tracking, {tracking: [wandb]}, _self_]\n")
    ConfigStore.instance().store(name="schema_tracking", node=_Schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        return OmegaConf.to_object(compose("main", overrides=list(overrides))).tracking  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], ["wandb"]),
        (["tracking=[]"], []),
        (["tracking=[wandb]"], ["wandb"]),
        (["tracking=[wandb,tensorboard]"], ["wandb", "tensorboard"]),
    ],
)
def test_trackers_are_chosen_as_a_list(overrides: list[str], kinds: list[str], tmp_path: Path) -> None:
    chosen = _compose(tmp_path, *overrides)
    assert [tracker.kind for tracker in chosen.values()] == kinds
    assert not [problem for tracker in chosen.values() for problem in tracker.problems()]


def test_a_tracker_is_set_under_its_own_name(tmp_path: Path) -> None:
    chosen = _compose(tmp_path, "tracking.wandb.project=other", "tracking.wandb.tags=[a,b]")
    assert (chosen["wandb"].project, chosen["wandb"].tags) == ("other", ["a", "b"])
