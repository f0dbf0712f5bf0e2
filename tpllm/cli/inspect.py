"""`tpllm inspect`: what a checkpoint or engine directory is, from its files' headers. No ranks, no MPI, no torch."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpllm.errors import DataError, TpllmError, UsageError
from tpllm.files import read_json

if TYPE_CHECKING:
    from tpllm.engine.base import EngineConfig, RankEngine

COLLECTIVE = re.compile("all_?reduce|all_?gather|collective", re.IGNORECASE)
HELP = "what a checkpoint or engine directory is: configuration, tensors, fingerprints, the launch it fits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint or engine directory")
    parser.add_argument("--json", action="store_true", help="all of it as JSON")


def work(args: argparse.Namespace) -> int:
    facts = engine_facts(args.directory) if is_engine(args.directory) else checkpoint_facts(args.directory)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(lines(facts)), flush=True)
    return 0


def is_engine(directory: Path) -> bool:
    """Whether a directory's `config.json` is an engine's rather than a checkpoint's."""
    if not directory.is_dir():
        raise UsageError(f"no such directory: {directory}")
    return "pretrained_config" in read_json(directory / "config.json", "a checkpoint or engine directory")


def checkpoint_facts(directory: Path) -> dict[str, Any]:
    """Everything but the weights' values; raises a `DataError` when a file is torn."""
    from tpllm.checkpoint import rank as files
    from tpllm.mapping import Mapping

    checkpoint, manifest = files.CheckpointConfig.load(directory), files.read_manifest(directory) or {}
    facts = checkpoint.to_json()
    ranks = []
    for mapping in Mapping.all_ranks(checkpoint.tp_size, checkpoint.pp_size):
        path = directory / files.rank_file(mapping.rank)
        tensors = {name: {"dtype": dtype, "shape": list(shape), "bytes": math.prod(shape) * bits(dtype) // 8}
                   for name, (dtype, shape) in files.read_header(files.open_weights(path, "numpy")).items()}
        entry = files.manifest_entry(directory, mapping) or {}
        ranks.append({"file": path.name, "bytes": path.stat().st_size, "fingerprint": entry.get("fingerprint"),
                      "tensors": tensors})
    fits = f"mpirun -n {checkpoint.tp_size} tpllm build --checkpoint-dir {directory} --output-dir DIR"
    return {"kind": "checkpoint", "directory": str(directory), "launch": fits if checkpoint.pp_size == 1 else None,
            "mapping": facts.pop("mapping"), "config": facts, "versions": {"tpllm": manifest.get("tpllm")},
            "source": manifest.get("source"), "ranks": ranks}


def bits(dtype: str) -> int:
    """Of one element, by safetensors' name of its type."""
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


def engine_facts(directory: Path) -> dict[str, Any]:
    """What config.json and every rank's engine say; raises when they do not belong together."""
    from tpllm.engine.base import LAYERS, engine_file

    config, ranks = engine_ranks(directory)
    return {"kind": "engine", "directory": str(directory),
            "launch": f"mpirun -n {config.tp_size} tpllm run --engine-dir {directory} --input-text TEXT",
            "mapping": {"tp_size": config.tp_size, "pp_size": 1}, "build": asdict(config.build),
            "config": config.model.to_json(), "versions": config.versions, "weights": config.checkpoint_dir,
            "ranks": [{"file": engine_file(meta.rank), "bytes": (directory / engine_file(meta.rank)).stat().st_size,
                       "fingerprint": meta.shard_fingerprint, "collectives": meta.collectives,
                       "members": {name: len(data) for name, data in members.items()},
                       "layers": plan_layers(members[LAYERS]) if LAYERS in members else None}
                      for meta, members in ranks]}


def plan_layers(inspected: bytes) -> list[dict[str, str | None]]:
    """Names and types of a TensorRT plan's layers, from the JSON of its engine inspector, kept when it was built."""
    return [{"name": layer["Name"], "type": layer.get("LayerType")} if isinstance(layer, dict)
            else {"name": layer, "type": None} for layer in json.loads(inspected)["Layers"]]


def engine_ranks(directory: Path) -> tuple[EngineConfig, list[tuple[RankEngine, dict[str, bytes]]]]:
    """An engine directory's configuration and every rank's engine, read whole and found to belong to it."""
    from tpllm.engine.base import EngineConfig, read_engine
    from tpllm.mapping import Mapping

    try:
        config = EngineConfig.load(directory)
        if config.tp_size < 1 or config.model.tp_problem(config.tp_size):
            raise DataError(f"tp_size is {config.tp_size!r}")
        config.digest()
    except (TpllmError, KeyError, TypeError, ValueError) as e:
        raise DataError(f"{directory / 'config.json'} is not an engine's: {e}") from None
    return config, [read_engine(directory, config, mapping) for mapping in Mapping.all_ranks(config.tp_size)]


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts as text; of ranks whose tensors are alike only the first one's are listed."""
    def words(values: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in values.items())

    config = facts["config"]
    text = [f"{facts['directory']}: {facts['kind']} of {config['architecture']}, {config['dtype']}, "
            f"{words(facts['mapping'])}",
            f"fits: {facts['launch'] or 'no launch: engines have no pipeline stages; convert with --pp-size 1'}"]
    text += [f"{name}: {words(facts[name]) if isinstance(facts[name], dict) else facts[name]}"
             for name in ("config", "build", "versions", "source", "weights") if facts.get(name)]
    shown: dict[str, Any] = {}
    layers: list[dict[str, Any]] | None = None
    for rank in facts["ranks"]:
        text.append(f"{rank['file']}: {rank['bytes']:,} bytes, fingerprint {rank['fingerprint']}")
        if rank.get("collectives"):
            text.append(f"  collectives in its graph: {words(rank['collectives'])}")
        parts = rank.get("tensors") or rank["members"]
        if parts != shown:
            shown = parts
            text += [f"  {name}  {part['dtype']} {part['shape']}, {part['bytes']:,} bytes" if isinstance(part, dict)
                     else f"  {name}, {part:,} bytes" for name, part in parts.items()]
        if rank.get("layers") and rank["layers"] != layers:
            layers = rank["layers"]
            named = sum(bool(COLLECTIVE.search(f"{layer['name']} {layer['type']}")) for layer in layers)
            text.append(f"  {len(layers)} layers by TensorRT's engine inspector, {named} of them named for collectives")
            text += [f"    {layer['name']}  {layer['type'] or ''}".rstrip() for layer in layers]
    return text
