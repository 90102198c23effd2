"""Commands about checkpoints: convert, export, upcycle, inspect, verify, parity."""

import argparse
from typing import Any

from echovlm_jax.cli.frame import LOCAL, MODEL, PLACE, Result, add_command

# Sizes of the mixture that `upcycle` has a flag for.
MIXTURE = {
    "num_experts": "in every layer",
    "top_k": "experts that a token goes to",
    "expert_mlp_dim": "width of an expert",
    "shared_mlp_dim": "width of the shared expert",
}


def add_convert(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.from_torch import convert

        return convert(
            args.src,
            args.dst,
            dtype=args.dtype,
            adapter=args.adapter,
            quantize=args.quantize,
            delete_source_shards=args.delete_source_shards,
        )

    command = add_command(
        commands,
        "convert",
        run,
        "convert a Hugging Face folder to an Orbax checkpoint, streaming; re-run the command to "
        "resume",
        "echovlm convert EchoVLM-hf/ echovlm-orbax/ --dtype bfloat16\n"
        "  echovlm convert EchoVLM-hf/ echovlm-int4/ --quantize int4\n"
        "  echovlm convert download/ echovlm-int8/ --quantize int8 --delete-source-shards",
    )
    command.add_argument("src", type=PLACE, metavar="SRC", help="a Hugging Face folder")
    command.add_argument("dst", type=PLACE, metavar="DST", help="the folder to make")
    command.add_argument("--dtype", metavar="D", help="store as D, e.g. bfloat16; default: as is")
    command.add_argument(
        "--adapter",
        type=PLACE,
        metavar="PEFT",
        help="merge a PEFT adapter's folder into the weights",
    )
    command.add_argument(
        "--quantize",
        metavar="KIND",
        help="store the decoder's products, embedding and head in int8 or int4; for generate and "
        "eval, and training with the key quantize",
    )
    command.add_argument(
        "--delete-source-shards",
        action="store_true",
        help="DELETE each weight file of SRC once what was made of it is on the disk and equals "
        "its digests: the disk need not hold both; links are refused",
    )


def add_export(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        if args.adapter:
            from echovlm_jax.convert.peft import export_adapter

            return export_adapter(args.model, args.dst)
        from echovlm_jax.convert.to_torch import export

        return export(
            args.model,
            args.dst,
            max_shard_size=args.max_shard_size,
            merge_lora=args.merge_lora,
        )

    command = add_command(
        commands,
        "export",
        run,
        "convert a checkpoint to a Hugging Face folder; a training run's low-rank updates are "
        "merged into its weights, or with --adapter written alone",
        "echovlm export echovlm-orbax/ EchoVLM-hf/ --max-shard-size 5GB",
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=MODEL)
    command.add_argument("dst", type=PLACE, metavar="DST", help="the folder to make")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s"
    )
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--merge-lora",
        action="store_true",
        help="refuse a model without low-rank updates; they are merged without this option too",
    )
    either.add_argument(
        "--adapter",
        action="store_true",
        help="write what a run trained as a PEFT adapter: its updates, and in full what trained in "
        "full; DST is one file, for use on top of the model that the run began with",
    )


def add_upcycle(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.upcycle import read_mixture, upcycle
        from echovlm_jax.train.config_file import check_config, load_config

        like = None
        if args.config and args.config.suffix == ".py":
            config = load_config(args.config)
            check_config(config)
            like = read_mixture(str(config.model))
        elif args.config:
            like = read_mixture(args.config)
        sizes = {name: getattr(args, name) for name in MIXTURE}
        return upcycle(
            args.src,
            args.dst,
            like=like,
            sizes=sizes,
            init=args.init,
            seed=args.seed,
            dtype=args.dtype,
        )

    command = add_command(
        commands,
        "upcycle",
        run,
        "add the experts that stage 1 trains to a dense Qwen2-VL or Qwen2.5-VL; its function is "
        "preserved and measured: exit code 1 if a logit changes by more than the stated bound",
        "echovlm upcycle Qwen2-VL-7B-Instruct/ echovlm-start/ --config configs/alignment.py",
    )
    command.add_argument("src", metavar="QWEN2VL", type=PLACE, help="a Hugging Face folder")
    command.add_argument("dst", metavar="DST", type=PLACE, help="the folder to make")
    command.add_argument(
        "--config",
        type=PLACE,
        metavar="F",
        help="take the mixture's sizes from the model of a training configuration (F.py), a model "
        "folder, a config.json or a preset; default: the released ones, scaled to the dense MLP",
    )
    for name, what in MIXTURE.items():
        flag = "--" + name.replace("_", "-").replace("num-", "")
        command.add_argument(flag, dest=name, metavar="N", type=int, help=what)
    command.add_argument(
        "--init",
        default="random",
        choices=["random", "sliced", "released"],
        help="new weights: random; experts sliced from the dense MLP; or all random as in the "
        "released scripts, which does not preserve the function. Default: %(default)s",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    command.add_argument("--dtype", metavar="D", help="store as D, e.g. float32; default: as is")


def add_inspect(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.inspect import inspect

        return inspect(args.model)

    command = add_command(
        commands,
        "inspect",
        run,
        "list the contents of a checkpoint, without loading its weights",
        "echovlm inspect EchoVLM-hf/",
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=MODEL)


def add_verify(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.storage.verify import verify

        return verify(args.model)

    command = add_command(
        commands,
        "verify",
        run,
        "compare every stored byte of a model or a training run with its digest; exit code 1 and "
        "the names of corrupt files",
        "echovlm verify runs/alignment/",
    )
    command.add_argument(
        "model", type=PLACE, metavar="MODEL", help="made by `convert`, `upcycle` or `train`"
    )


def add_parity(commands: Any) -> None:
    def run(args: argparse.Namespace) -> Result:
        from echovlm_jax.convert.parity import parity

        return parity(args.model, args.golden, atol=args.atol)

    command = add_command(
        commands,
        "parity",
        run,
        "compare a checkpoint, stage by stage, with outputs recorded from PyTorch; "
        "exit code 1 if they differ",
        "echovlm parity echovlm-orbax/ --golden golden.npz --atol 1e-4",
    )
    command.add_argument("model", type=PLACE, metavar="MODEL", help=MODEL)
    command.add_argument("--golden", type=LOCAL, required=True, metavar="F.npz")
    command.add_argument(
        "--atol", type=float, default=1e-4, metavar="X", help="default: %(default)s"
    )
