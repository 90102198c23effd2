"""Stage 2 on one chip: QLoRA (arXiv 2305.14314). The base lies there in few bits and trains by
low-rank updates; the mixture's own small parameters train in full.

Sizes are for one TPU v5e, 16 GB: `echovlm plan --config configs/colab_qlora.py --topology v5e:1x1`.
In full the experts alone would take 12 bytes for each of 3.4 B parameters.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_11b"  # for a real run, the folder that stage 1 left
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.quantize = "int8"  # int4 needs 3 GiB less, and is less exact
    config.stage = "instruction"  # the tasks; what trains is said here:
    config.stage_rules = (
        ("text/layers/(moe/(router|shared_gate)|coefficient)/.*", "full"),
        (r"text/layers/(attn|mlp|moe/shared|moe/experts)/\w+/kernel", "lora"),
        # The tower is 6 % of the weights, not quantized, and has an eighth of the updates.
        (r"vision/(blocks/(attn|mlp)|merger)/\w+/kernel", "lora"),
        (".*", "frozen"),
    )

    config.steps = 1_000  # 8,000 rows
    config.global_batch_size = 8
    config.grad_accum = 8  # one row at a time
    config.balance_over = "row"  # the router's load over a part needs no pass over the others
    # Of the phantom, a token a byte, every tenth choice between four reports is longer than a row,
    # and every sixth exam's images are shrunk: `echovlm data stats phantom --config` this file.
    config.seq_len = 1024
    config.max_patches = 1568
    config.allow_dropped = 0.1
    config.max_image_patches = 784  # the recipe's largest image: 196 tokens of 4 patches
    config.mix_temperature = 1.0  # organs as often as they are in the data

    config.learning_rate = 1e-4  # the peak
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    # No dropout: an expert's update is added to its weight, whose inputs are spread over experts.
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.0})  # scale: alpha / rank = 2

    config.moe_dispatch = "auto"  # ragged on TPUs, dense elsewhere: the fastest that drops nothing
    config.dtype = "bfloat16"  # of the products, and of what is frozen and not quantized
    config.param_dtype = "float32"  # of what trains: in bfloat16 most steps would round to none
    config.remat = "full"  # a layer's inputs alone are stored
    config.optimization_level = "O1"  # compiles in a minute; the default takes three times as long
    # One chip; more of them share the weights, and want a batch of as many rows.
    config.mesh = ConfigDict({"data": -1, "fsdp": -1, "expert": 1, "tensor": 1, "sequence": 1})

    config.log_every = 10
    config.eval_every = 200
    config.checkpoint_every = 200
    config.checkpoint_keep = 2
    return config
