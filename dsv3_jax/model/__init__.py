"""The architecture of DeepSeek-V3, one idea per file: attention, router, experts, blocks, MTP, and the whole model.

Beside the equations are the seams that they call: `attend`, `cache`, `linear`, `logits`, `remat`. The equations don't
name a backend, a mesh axis or the memory layout of a cache.

Letters of shapes, in docstrings here and in the other packages:

    B  sequences                  D  hidden_size                    E  n_routed_experts
    T  tokens, or queries         F  hidden width of a feed-forward K  num_experts_per_tok
    S  keys                       H  num_attention_heads            G  groups of a grouped matmul
    L  layers                     R  kv_lora_rank                   M  rows of a matmul; N: tokens of a flattened batch
    V  vocab_size                 P  qk_rope_head_dim               I, O  input and output axes of a weight

In attention N is qk_nope_head_dim and Vd is v_head_dim.
"""
