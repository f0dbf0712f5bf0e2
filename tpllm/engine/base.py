"""The contract between engines and everything that uses them, and the engine directory on disk."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from collections.abc import Mapping as TypingMapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tpllm.config import ModelConfig
from tpllm.distributed import World
from tpllm.errors import DataError, MismatchError, UsageError
from tpllm.files import digest, read_json
from tpllm.mapping import Mapping

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

META = "engine.json"
LAYERS = "layers.json"  # a member that some backends give: what their compiler's inspector says of the layers
STEP_TOKENS = {"cuda": 8192, "cpu": 2048}  # of one step: longer prompts come in chunks
STEP_ROWS = 2048  # of logits in one step: prompts of which every token's are wanted come in smaller chunks
RANDOM = "random weights"  # the fingerprint of an engine that is built to be measured without a checkpoint


@dataclass(frozen=True)
class BuildConfig:
    """Limits and backend an engine is built for; lengths in tokens."""

    backend: str = "inductor"
    device: str = "auto"
    max_batch_size: int = 8
    max_input_len: int = 1024
    max_seq_len: int = 2048
    max_num_tokens: int | None = None  # None: what suits the device

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {number}; it starts at 1")
        if self.max_num_tokens is not None and self.max_num_tokens < self.max_batch_size:
            raise UsageError(f"--max-num-tokens {self.max_num_tokens} is less than --max-batch-size "
                             f"{self.max_batch_size}: a step has a token of each sequence")
        if self.max_input_len > self.max_seq_len:
            raise UsageError(f"--max-input-len {self.max_input_len} is more than --max-seq-len {self.max_seq_len}")

    @property
    def step_tokens(self) -> int:
        """The most tokens of one step, of a build whose device is known."""
        return self.max_num_tokens or max(STEP_TOKENS[self.device], self.max_batch_size)

    @property
    def step_rows(self) -> int:
        """The most rows of logits of one step, of a build whose device is known."""
        return min(self.step_tokens, max(STEP_ROWS, self.max_batch_size))


@dataclass(frozen=True)
class EngineConfig:
    """An engine directory's `config.json`."""

    model: ModelConfig
    build: BuildConfig
    tp_size: int
    checkpoint_dir: str
    versions: dict[str, str]
    weights_in_engine: bool = False  # or engines are code only, and the weights stay in the checkpoint

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.versions["tpllm"],
            "pretrained_config": self.model.to_json() | {"mapping": {
                "world_size": self.tp_size, "tp_size": self.tp_size, "pp_size": 1}},
            "build_config": asdict(self.build),
            "weights": {"in_engine": self.weights_in_engine, "checkpoint_dir": self.checkpoint_dir},
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: Path) -> EngineConfig:
        if not directory.is_dir():
            raise UsageError(f"no such engine directory: {directory}")
        data = read_json(directory / "config.json", "an engine directory")
        try:
            known = {f.name for f in fields(BuildConfig)}
            config = cls(
                model=ModelConfig.from_json(data["pretrained_config"]),
                build=BuildConfig(**{k: v for k, v in data["build_config"].items() if k in known}),
                tp_size=data["pretrained_config"]["mapping"]["tp_size"],
                checkpoint_dir=data["weights"]["checkpoint_dir"], versions=data["versions"],
                weights_in_engine=data["weights"]["in_engine"])
            words = [config.build.backend, config.build.device, config.checkpoint_dir, config.versions["torch"],
                     config.versions["tpllm"]]
            if not all(type(word) is str for word in words) or type(config.tp_size) is not int:
                raise TypeError(f"one of {[*words, config.tp_size]} is of another kind")
        except (KeyError, TypeError, AttributeError) as e:
            raise DataError(f"{directory}/config.json is not an engine's: {type(e).__name__}: {e}") from None
        return config

    def digest(self) -> str:
        """Of everything the compiled code depends on; kept in each rank's engine and compared at load."""
        data = self.to_json()
        del data["weights"]
        return digest(json.dumps(data, sort_keys=True).encode())


@dataclass(frozen=True)
class RankEngine:
    """What a `rank{N}.engine` says of itself."""

    rank: int
    tp_size: int
    backend: str
    config_digest: str
    shard_fingerprint: str
    collectives: dict[str, int]  # number of each collective in this rank's graph


@dataclass(frozen=True)
class StepInput:
    """One step over several sequences, packed; all arrays int32.

    A sequence's keys and values live in one run of rows of the cache arena. `B` sequences take part with
    `T` new tokens in all; logits are wanted for `R` of them.
    """

    tokens: NDArray[np.int32]  # [T]
    query_start: NDArray[np.int32]  # [B+1] first token of each sequence, and T
    start: NDArray[np.int32]  # [B] first arena row of each sequence's run
    length: NDArray[np.int32]  # [B] tokens of the sequence after this step
    rows: NDArray[np.int32]  # [R] which of the T tokens need logits
    # [C, 3] runs of arena rows to copy before the step: first row, first row to write, count; all are read first
    copies: NDArray[np.int32] | None = None
    # [T] for a token that the host does not know yet: its place among those that `feed` was given last; else -1
    fed: NDArray[np.int32] | None = None
    feeds: int = 0  # tokens that `feed` is given after this step; 0: it is not called


class Engine(Protocol):
    """One rank's executable model. Every rank calls `step` with the same input."""

    config: EngineConfig
    capacity: int  # rows of the cache arena
    unit: int  # sequences own runs of this many rows, or of a multiple of it, beginning at a multiple of it
    singles: int  # in a step with longer ones, sequences of one token take room like the next multiple of this many
    ahead: bool  # `step` returns before its logits are computed, so the next one may begin before they are

    def step(self, step: StepInput) -> torch.Tensor:
        """Float32 logits `[R, vocab]`, whole on every rank, on the engine's device."""

    def feed(self, count: int, tokens: torch.Tensor | None) -> Callable[[], list[int]]:
        """Keep what the last step's sequences go on with, `tokens [count]` on rank 0, on the device for the next step.

        Only of engines that run ahead; collective. The result waits for these tokens and returns them.
        """
        raise AssertionError("steps of this engine are not begun ahead")


class Backend(Protocol):
    """Builds engines from a rank's checkpoint, and loads them."""

    def choose_device(self, name: str, world: World) -> str:
        """`cuda` or `cpu`: what `--device` means in this launch, `auto` included; collective."""

    def settle(self, config: EngineConfig, world: World) -> EngineConfig:
        """`config` with what only the launch tells: engines are code for one kind of device; collective."""
        device = world.together("build", lambda: self.choose_device(config.build.device, world))
        return replace(config, build=replace(config.build, device=device))

    def build(self, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None, out: Path, world: World,
              model_file: Path | None) -> None:
        """Write this rank's engine file into `out`; collective. Without a checkpoint, for random weights."""

    def load(self, directory: Path, config: EngineConfig, mapping: Mapping, checkpoint_dir: Path | None,
             world: World) -> Engine:
        """This rank's engine, ready to step; collective."""


def engine_file(rank: int) -> str:
    return f"rank{rank}.engine"


def write_engine(path: Path, meta: RankEngine, members: TypingMapping[str, bytes | memoryview]) -> None:
    """A zip of the description and the backend's own members; each member's CRC is checked when it is read."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(META, json.dumps(asdict(meta), indent=2))
        for name, data in members.items():
            archive.writestr(name, data)


def read_engine(directory: Path, config: EngineConfig, mapping: Mapping) -> tuple[RankEngine, dict[str, bytes]]:
    """A rank's engine file, refused when it is torn or not this rank's."""
    path = directory / engine_file(mapping.rank)
    if not path.is_file():
        raise DataError(f"{directory} lacks {path.name}; build it again: {build_command(config)}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        meta = RankEngine(**json.loads(members.pop(META)))
    except Exception as e:  # a torn zip makes zipfile raise almost anything
        raise DataError(f"{path} ({path.stat().st_size} bytes) is torn: {e}; build it again: "
                        f"{build_command(config)}") from None
    if (meta.rank, meta.tp_size, meta.backend) != (mapping.rank, mapping.tp_size, config.build.backend):
        raise MismatchError(f"{path} was built as rank {meta.rank} of {meta.tp_size} by {meta.backend}, "
                            f"here rank {mapping.rank} of {mapping.tp_size} by {config.build.backend} is needed")
    if meta.config_digest != config.digest():
        raise MismatchError(f"{path} does not belong to the config.json beside it; build again: "
                            f"{build_command(config)}")
    return meta, members


def check_shard(path: Path, meta: RankEngine, fingerprint: str, config: EngineConfig) -> None:
    """Refuse weights other than those the engine was built for."""
    if meta.shard_fingerprint != fingerprint:
        raise MismatchError(f"{path} is not the shard this engine was built for (fingerprint {fingerprint[:12]}, "
                            f"built for {meta.shard_fingerprint[:12]}): the checkpoint changed; build again: "
                            f"{build_command(config)}")


def build_command(config: EngineConfig) -> str:
    """What to type to have an engine again."""
    if not config.checkpoint_dir:  # it has random weights
        return f"remove its directory, then mpirun -n {config.tp_size} tpllm bench … as before"
    return f"mpirun -n {config.tp_size} tpllm build --checkpoint-dir {config.checkpoint_dir} …"


def versions() -> dict[str, str]:
    """What an engine is made with; `torch` decides whether its code can be loaded."""
    import platform

    import torch

    from tpllm import __version__

    return {"tpllm": __version__, "torch": torch.__version__, "python": platform.python_version()}
