"""What decides which data a run sees, and in which order: one part of its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echovlm_jax.errors import InputError
from echovlm_jax.storage.files import as_path


@dataclass(frozen=True)
class Settings:
    """The configuration's keys that the data depends on. Hashable; small enough to send about."""

    data: str  # a dataset's folder, or "phantom"
    model: str  # a preset's name, or a MODEL folder
    stage: str  # alignment, instruction or full: which tasks are set
    seq_len: int  # tokens a row
    max_patches: int  # patches a row
    max_image_patches: int  # patches an image, or a time step of a video
    global_batch_size: int  # rows a batch, over all processes
    seed: int = 0
    split: str = "train"
    tokenizer: str | None = None  # a folder, where `model` has none or another is wanted
    task_weights: tuple[tuple[str, float], ...] | None = None  # None: the stage's own
    organ_weights: tuple[tuple[str, float], ...] | None = None  # or mix_temperature
    mix_temperature: float | None = None
    workers: int = 2  # processes; 0: none, everything in this one
    cache: Path | None = None  # a folder for plans; None: they are made anew at each start

    def __post_init__(self) -> None:
        least = {"seq_len": 1, "max_patches": 0, "max_image_patches": 1, "global_batch_size": 1}
        for name, low in {**least, "seed": 0, "workers": 0}.items():
            if getattr(self, name) < low:
                key = "data_workers" if name == "workers" else name
                raise InputError(
                    f"config key {key} must be at least {low}; found {getattr(self, name)}"
                )
        if self.seed >= 2**63:
            raise InputError(f"config key seed must be below 2**63; found {self.seed}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Of a training configuration (ml_collections).

        Raises:
          InputError: a key is missing, or its value can't be.
        """
        needed = ("data", "model", "stage", "seq_len", "max_patches", "max_image_patches")
        for key in (*needed, "global_batch_size", "seed"):
            if key not in config:
                raise InputError(f"the configuration lacks {key}; see configs/ for examples")

        def weights(group: str) -> tuple[tuple[str, float], ...] | None:
            found = config.get(group)
            given = {name: w for name, w in (found or {}).items() if w is not None}
            return tuple(sorted((name, float(w)) for name, w in given.items())) if given else None

        cache, workers = config.get("data_cache"), config.get("data_workers")
        return cls(
            data=str(config["data"]),
            model=str(config["model"]),
            stage=str(config["stage"]),
            seq_len=int(config["seq_len"]),
            max_patches=int(config["max_patches"]),
            max_image_patches=int(config["max_image_patches"]),
            global_batch_size=int(config["global_batch_size"]),
            seed=int(config["seed"]),
            split=str(config.get("split") or "train"),
            tokenizer=config.get("tokenizer"),
            task_weights=weights("task_weights"),
            organ_weights=weights("organ_weights"),
            mix_temperature=config.get("mix_temperature"),
            workers=2 if workers is None else int(workers),
            cache=as_path(cache) if cache else None,
        )
