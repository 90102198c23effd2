"""Stage 2: the new path learns in full, every other product of the model by a low-rank update.

The recipe is the paper's (arXiv 2509.14977). Sizes are for a v5e:2x4 slice, 8 chips:
`echovlm plan --config configs/instruction.py --topology v5e:2x4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_11b"  # for a real run, the folder that stage 1 left
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.stage = "instruction"  # moe and coefficient in full, LoRA beside the linear layers

    # One epoch of the official 187,273 records, if two share a row: 16 records a step.
    config.steps = 11_700
    config.global_batch_size = 8  # packed rows: one a chip on 8 chips
    config.grad_accum = 1
    # Rows fitted to the phantom (`echovlm data stats phantom --config` this file, a token a byte):
    # nothing of any task is left out, and rows are full to 95 % of tokens and 75 % of patches. An
    # exam has up to 3,360 patches, so that fewer a row would shrink images. Fit your own data
    # likewise: the same command with its folder suggests max_patches.
    config.seq_len = 2048  # an exam takes 500 tokens, a choice between four reports 2,000
    config.max_patches = 3456
    config.max_image_patches = 784  # the recipe's largest image: 196 tokens of 4 patches
    config.mix_temperature = 1.0  # organs as often as they are in the data

    config.learning_rate = 1e-4  # the peak, of updates and new path alike
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.05})  # scale: alpha / rank = 2

    config.moe_dispatch = "auto"  # ragged on TPUs, dense elsewhere: the fastest that drops nothing
    config.dtype = "bfloat16"  # of the products, and of the weights that don't train
    config.param_dtype = "float32"  # of those that do: in bfloat16 most steps would round to none
    config.remat = "full"  # a layer's inputs alone are stored: 8 chips have 15.75 GiB each
    # XLA:TPU's effort: O1 compiles in a minute; the default takes three times as long, and overlaps
    # weights' travel with products. Measure it on the pod before a long run.
    config.optimization_level = "O1"
    # Weights over up to 64 chips, copies of that over the rest.
    config.mesh = ConfigDict({"data": -1, "fsdp": -1, "expert": 1, "tensor": 1, "sequence": 1})

    config.log_every = 10
    config.eval_every = 500
    config.checkpoint_every = 500
    config.checkpoint_keep = 3
    return config
