"""The second EchoVLM, stage 1: the projector learns, Qwen2.5-VL stays as it is.

What trains and how large images are is as the authors' preview was made; all else is the first
model's recipe (arXiv 2509.14977). Sizes are for a v5e:2x4 slice, 8 chips:
`echovlm plan --config configs/v2_alignment.py --topology v5e:2x4`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "echovlm_v2_7b"  # for a real run, the folder of a converted Lingshu-7B
    config.data = "phantom"  # synthetic exams; or the folder of a dataset
    config.stage = "alignment"
    config.stage_rules = ((r"vision/merger/fc\d/.*", "full"), (".*", "frozen"))

    # One epoch of the official 187,273 records, if two share a row: 16 records a step.
    config.steps = 11_700
    config.global_batch_size = 8  # packed rows: one a chip on 8 chips
    config.grad_accum = 1
    # The first recipe's cap of 784 patches an image is not taken over: this model saw up to
    # 1,048,576 pixels, 5,349 patches of 14 × 14.
    config.seq_len = 4096
    config.max_patches = 6912  # rows of the phantom are full to 95 % of tokens, 72 % of patches
    config.max_image_patches = 5349
    config.mix_temperature = 1.0  # organs as often as they are in the data

    config.learning_rate = 1e-4  # the peak
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    # Nothing has updates in this stage; these count where stage_rules say lora.
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.05})

    config.moe_dispatch = "auto"  # there are no experts; read where upcycle has added some
    config.dtype = "bfloat16"  # of the products, and of the weights that don't train
    config.param_dtype = "float32"  # of those that do: in bfloat16 most steps would round to none
    config.remat = "full"  # backward goes through every layer, to the merger: its inputs alone stay
    config.optimization_level = "O1"  # XLA:TPU's effort: see alignment.py
    # Weights over up to 64 chips, copies of that over the rest.
    config.mesh = ConfigDict({"data": -1, "fsdp": -1, "expert": 1, "tensor": 1, "sequence": 1})

    config.log_every = 10
    config.eval_every = 500
    config.checkpoint_every = 500
    config.checkpoint_keep = 3
    return config
