"""One chip, weights in int8: the smallest training.

Sizes are for one TPU v5e, 16 GB: `echovlm plan --config configs/colab_int8.py --topology v5e:1x1`.
What trains is 0.7 M values, the mixture's router, gates and coefficients.
`colab_qlora.py` trains updates of the other weights too.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_11b"  # for a real run, the folder that stage 1 left
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.quantize = "int8"  # a scale for each output
    config.stage = "instruction"  # the tasks; what trains is said here:
    config.stage_rules = (
        ("text/layers/(moe/(router|shared_gate)|coefficient)/.*", "full"),
        (".*", "frozen"),
    )

    config.steps = 200
    config.global_batch_size = 4
    config.grad_accum = 4  # one row at a time
    config.balance_over = "row"  # the router's load over a part needs no pass over the others
    # Rows that leave out nothing of the phantom, see instruction.py.
    config.seq_len = 2048
    config.max_patches = 3456
    config.max_image_patches = 784  # the recipe's largest image: 196 tokens of 4 patches
    config.mix_temperature = 1.0  # organs as often as they are in the data

    config.learning_rate = 1e-4  # the peak
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.0})  # nothing has an update

    config.moe_dispatch = "auto"  # ragged on TPUs, dense elsewhere: the fastest that drops nothing
    config.dtype = "bfloat16"  # of the products, and of what is frozen and not quantized
    config.param_dtype = "float32"  # of what trains: in bfloat16 most steps would round to none
    config.remat = "full"  # a layer's inputs alone are stored
    config.optimization_level = "O1"  # compiles in a minute; the default takes three times as long
    # One chip; more of them share the weights, and want a batch of as many rows.
    config.mesh = ConfigDict({"data": -1, "fsdp": -1, "expert": 1, "tensor": 1, "sequence": 1})

    config.log_every = 10
    config.eval_every = 100
    config.checkpoint_every = 100
    config.checkpoint_keep = 2
    return config
