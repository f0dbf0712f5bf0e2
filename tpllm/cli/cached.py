"""`tpllm run` on weights instead of an engine: convert and build once, into a cache."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tpllm import __version__
from tpllm.cli import build, convert
from tpllm.files import source_key
from tpllm.settings import setting

if TYPE_CHECKING:
    from tpllm.distributed import World


def cached_engine(args: argparse.Namespace, world: World) -> Path:
    """The engine for this source, this number of ranks and these options; made now if there is none yet."""
    options = [__version__, str(world.size), args.dtype, args.backend, str(args.model_file)]
    source: Path = args.meta_ckpt_dir or args.hf_model_dir or args.checkpoint_dir
    key = world.broadcast(source_key(source, options)[:16])
    root = Path(setting("TPLLM_CACHE")).expanduser()
    checkpoint, engine = args.checkpoint_dir, root / f"{key}-engine"
    model = ["--model-file", str(args.model_file)] if args.model_file else []
    if checkpoint is None:
        checkpoint = root / f"{key}-checkpoint"
        argv = ["--meta-ckpt-dir" if args.meta_ckpt_dir else "--hf-model-dir", str(source), "--output-dir",
                str(checkpoint), "--tp-size", str(world.size), "--dtype", args.dtype, *model]
        if not world.broadcast(checkpoint.is_dir()):
            convert.convert(parse(convert, argv), world)
    if not world.broadcast(engine.is_dir()):
        argv = ["--checkpoint-dir", str(checkpoint), "--output-dir", str(engine), "--backend", args.backend, *model]
        build.build(parse(build, argv), world)
    return engine


def parse(verb: object, argv: list[str]) -> argparse.Namespace:
    """A verb's arguments with its own defaults."""
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(argv)
