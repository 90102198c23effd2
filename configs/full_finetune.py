"""All parameters of the 11.7 B model, in float32 with Adam: for a v5e:4x4 slice or larger.

The optimizer is the paper's (arXiv 2509.14977); what is about memory and speed was chosen with
`echovlm plan --config configs/full_finetune.py --topology v5e:4x4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_11b"
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.stage = "full"

    config.steps = 10_000
    config.global_batch_size = 16  # packed rows: one a chip on 16 chips
    config.grad_accum = 1
    # Rows fitted to the phantom (`echovlm data stats phantom --config` this file, a token a byte):
    # nothing of any task is left out, and rows are full to 95 % of tokens and 75 % of patches. An
    # exam has up to 3,360 patches, so that fewer a row would shrink images. Fit your own data
    # likewise: the same command with its folder suggests max_patches.
    config.seq_len = 2048  # an exam takes 500 tokens, a choice between four reports 2,000
    config.max_patches = 3456
    config.max_image_patches = 784  # the recipe's largest image: 196 tokens of 4 patches
    config.mix_temperature = 1.0

    config.learning_rate = 1e-5  # a tenth of the stages' 1e-4, because the dense weights train too
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.05})

    config.moe_dispatch = "auto"  # ragged on TPUs, dense elsewhere: the fastest that drops nothing
    config.dtype = "bfloat16"
    config.param_dtype = "float32"
    config.remat = "full"
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
