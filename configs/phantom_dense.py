"""`phantom.py` without the mixture of experts: a plain Qwen2-VL of the same widths."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.model = "nano_dense"  # phantom.py's nano without its second path
    config.data = "phantom"  # or the folder of exams like it, which saves drawing them again
    config.stage = "full"

    config.steps = 1500
    config.global_batch_size = 2  # packed rows: 10 exams a step
    config.grad_accum = 1
    # Rows fitted to the phantom (`echovlm data stats phantom --config` this file), a token a byte:
    # nothing of any task is left out, and rows are full to 89 % of tokens and 84 % of patches. With
    # a tokenizer of its own (`echovlm data tokenizer`) the demo's reports fit rows of 256.
    config.seq_len = 2048  # an exam takes 350 tokens, a choice between four Chinese reports 1,800
    config.max_patches = 640  # an exam has 100, at most 384
    config.max_image_patches = 64  # 112 × 112 pixels, 16 tokens: a lesion is two tokens wide
    config.mix_temperature = 1.0

    config.learning_rate = 2e-3  # 4e-3 learned more slowly, 1e-3 no faster
    config.warmup_fraction = 0.05
    config.adam_b1 = 0.9
    config.adam_b2 = 0.99  # a short run: the second moment has to keep up
    config.adam_eps = 1e-8
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.lora = ConfigDict({"rank": 8, "alpha": 16, "dropout": 0.05})

    config.moe_dispatch = "dense"  # the fastest on a CPU of those that drop nothing
    config.dtype = "float32"  # on a CPU bfloat16 is slower
    config.param_dtype = "float32"
    config.remat = "none"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1, "sequence": 1})
    config.data_workers = 1  # beside the step, on the other core

    config.log_every = 20
    config.eval_every = 500
    config.checkpoint_every = 500
    config.checkpoint_keep = 2
    return config
