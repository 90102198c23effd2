"""The second EchoVLM, stage 2: a low-rank update beside every linear layer, all else frozen.

What trains and how large images are is as the authors' preview was made; all else is the first
model's recipe (arXiv 2509.14977). Sizes are for a v5e:2x4 slice, 8 chips:
`echovlm plan --config configs/v2_lora.py --topology v5e:2x4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_v2_7b"  # for a real run, the folder that stage 1 left
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.stage = "instruction"
    config.stage_rules = (
        (r"text/layers/(attn|mlp)/\w+/kernel", "lora"),
        (r"vision/(blocks/(attn|mlp)|merger)/\w+/kernel", "lora"),
        (".*", "frozen"),
    )

    # One epoch of the official 187,273 records, if two share a row: 16 records a step.
    config.steps = 11_700
    config.global_batch_size = 8  # packed rows: one a chip on 8 chips
    config.grad_accum = 1
    # Rows of the phantom are full to 95 % of tokens and 76 % of patches (`echovlm data stats`).
    config.seq_len = 2048
    config.max_patches = 3456
    config.max_image_patches = 576  # this stage's largest image: 144 tokens of 4 patches
    config.mix_temperature = 1.0  # organs as often as they are in the data

    config.learning_rate = 1e-4  # the peak
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.05})  # scale: alpha / rank = 2

    config.moe_dispatch = "auto"  # there are no experts; read where upcycle has added some
    config.dtype = "bfloat16"  # of the products, and of the weights that don't train
    config.param_dtype = "float32"  # of those that do: in bfloat16 most steps would round to none
    config.remat = "full"  # a layer's inputs alone are stored: 8 chips have 15.75 GiB each
    config.optimization_level = "O1"  # XLA:TPU's effort: see instruction.py
    # Weights over up to 64 chips, copies of that over the rest.
    config.mesh = ConfigDict({"data": -1, "fsdp": -1, "expert": 1, "tensor": 1, "sequence": 1})

    config.log_every = 10
    config.eval_every = 500
    config.checkpoint_every = 500
    config.checkpoint_keep = 3
    return config
