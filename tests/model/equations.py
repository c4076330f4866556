"""The report's equations 1 to 25 in float64 NumPy, one sequence at a time: what the model and its losses must compute.

Shares nothing with the package but the names of parameters. YaRN is left out: files of other programs test it.
"""

import jax
import numpy as np


def random_variables(model, rng):
    """As training could leave them: no scale of a norm is one, biases are large enough to change choices."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))

    def draw(path, leaf):
        mean, deviation = (1, 0.3) if path[-1].key.endswith("norm") else (0, 0.4)
        return (mean + deviation * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def float64(tree):
    return {k: float64(v) if hasattr(v, "items") else np.asarray(v, np.float64) for k, v in tree.items()}


def layer(tree, i):
    """One layer of a stack of them."""
    return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, positions, c):
    """x (T, H, P): neighbours are the real and imaginary part of a number that turns with its position."""
    rate = c.rope_theta ** (-np.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[:, None, None] * rate)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def attention(p, x, positions, segments, c):
    """Eq. 1 to 11 on x (T, D)."""
    nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
    if c.q_lora_rank is None:
        q = np.einsum("td,dhn->thn", x, p["q_proj"])
    else:
        q = np.einsum("tr,rhn->thn", norm(x @ p["q_a_proj"], p["q_a_layernorm"], 1e-6), p["q_b_proj"])
    kv = x @ p["kv_a_proj_with_mqa"]
    latent = norm(kv[:, :rank], p["kv_a_layernorm"], 1e-6)
    k_rope = rotate(kv[:, None, rank:], positions, c)[:, 0]
    q_rope = rotate(q[..., nope:], positions, c)
    k = np.einsum("sr,rhn->shn", latent, p["k_b_proj"])
    v = np.einsum("sr,rhv->shv", latent, p["v_b_proj"])
    scores = np.einsum("thn,shn->hts", q[..., :nope], k) + np.einsum("thp,sp->hts", q_rope, k_rope)
    sees = np.tril(np.ones((len(x), len(x)), bool)) & (segments[:, None] == segments)
    weights = softmax(np.where(sees, scores / np.sqrt(nope + c.qk_rope_head_dim), -np.inf))
    return np.einsum("hts,shv,hvd->td", weights, v, p["o_proj"])


def swiglu(p, x):
    return (silu(x @ p["gate_proj"]) * (x @ p["up_proj"])) @ p["down_proj"]


def moe(p, bias, x, c):
    """Eq. 12 to 16 with node-limited routing, and eq. 17 to 20: output, tokens of each expert, sum of f_i P_i."""
    z = x @ p["gate"]["weight"]
    s = 1 / (1 + np.exp(-z)) if c.scoring_func == "sigmoid" else softmax(z)
    experts, k = c.n_routed_experts, c.num_experts_per_tok
    y, load, f, mean = np.zeros_like(x), np.zeros(experts), np.zeros(experts), np.zeros(experts)
    for t in range(len(x)):
        biased = s[t] + bias
        groups = np.split(np.arange(experts), c.n_group)
        best = 2 if c.topk_method == "noaux_tc" else 1
        ranked = sorted(groups, key=lambda g, b=biased: -np.sort(b[g])[-best:].sum())
        allowed = np.concatenate(ranked[: c.topk_group])
        chosen = allowed[np.argsort(-biased[allowed])[:k]]
        weight = s[t, chosen] / (s[t, chosen].sum() if c.norm_topk_prob else 1) * c.routed_scaling_factor
        y[t] = sum(w * swiglu(layer(p["experts"], e), x[t]) for e, w in zip(chosen, weight, strict=True))
        load[chosen] += 1
        f[np.argsort(-s[t])[:k]] += experts / (k * len(x))
        mean += s[t] / s[t].sum() / len(x)
    if c.n_shared_experts:
        y += swiglu(p["shared_experts"], x)
    return y, load, f @ mean


def block(p, bias, x, where, c):
    x = x + attention(p["self_attn"], norm(x, p["input_layernorm"], c.rms_norm_eps), *where, c)
    h = norm(x, p["post_attention_layernorm"], c.rms_norm_eps)
    if "gate" not in p["mlp"]:
        return x + swiglu(p["mlp"], h), None, None
    y, load, balance = moe(p["mlp"], bias, h, c)
    return x + y, load, balance


def forward(p, router, tokens, further, c, positions=None, segments=None):
    """One sequence: logits (T, V) of each depth, from 0, and {name: (loads, balance losses)} of its sparse layers."""
    length = len(tokens)
    where = (
        np.arange(length) if positions is None else positions,
        np.zeros(length) if segments is None else segments,
    )

    bias = lambda stack: stack["mlp"]["gate"]["e_score_correction_bias"]
    x, routing = p["embed_tokens"][tokens], {}
    for i in range(c.first_k_dense_replace):
        x, _, _ = block(layer(p["dense_layers"], i), None, x, where, c)
    for i in range(c.num_hidden_layers - c.first_k_dense_replace):
        b = bias(router["moe_layers"])[i] if router else 0.0
        x, load, balance = block(layer(p["moe_layers"], i), b, x, where, c)
        loads, balances = routing.setdefault("moe_layers", ([], []))
        loads.append(load)
        balances.append(balance)
    hidden = norm(x, p["norm"], c.rms_norm_eps)
    logits = [hidden @ p["lm_head"]]
    for k, ahead in enumerate(further):  # eq. 21 to 23, in the released weights' form
        m = p[f"mtp_{k}"]
        both = [norm(p["embed_tokens"][ahead], m["enorm"], c.rms_norm_eps), norm(hidden, m["hnorm"], c.rms_norm_eps)]
        x = np.concatenate(both, -1) @ m["eh_proj"]
        b = bias(router[f"mtp_{k}"]["block"]) if router else 0.0
        x, load, balance = block(m["block"], b, x, where, c)
        routing[f"mtp_{k}"] = ([load], [balance])
        hidden = norm(x, m["norm"], c.rms_norm_eps)
        logits.append(hidden @ p["lm_head"])
    return logits, routing


def objective(p, router, rows, c, alpha, mtp_weight, segments, trained):
    """Eq. 17 and 24 to 25 over a batch of rows (B, T + 1), each of T tokens and the one that follows.

    A target counts if it is in the row, is trained and is of the document of the token that predicts it; the row's last
    token goes on with the last document. A depth that looks past what there is takes the last token again.

    Args: segments, trained (B, T): documents, and which of the tokens rows[:, 1:] are to be predicted.

    Returns the objective, {name: loads (L, E) or (E,)}, and for each depth the sum of CE, how many targets it has and
    how many of them the largest logit hits; and the sum of balance losses.
    """
    length, depths = rows.shape[1] - 1, c.num_nextn_predict_layers
    ce, count, hits = np.zeros(depths + 1), np.zeros(depths + 1), np.zeros(depths + 1)
    balance, loads = 0.0, {}
    for row, segment, train in zip(rows, segments, trained, strict=True):
        document = np.append(segment, segment[-1])
        known = row if train[-1] else row[:-1]
        further = [known[np.minimum(np.arange(length) + k, len(known) - 1)] for k in range(1, depths + 1)]
        logits, routing = forward(p, router, row[:-1], further, c, segments=segment)
        for k, z in enumerate(logits):
            for i in range(length - k):
                if document[i] == document[i + k + 1] and train[i + k]:
                    ce[k] -= np.log(softmax(z[i]))[row[i + k + 1]]
                    count[k] += 1
                    hits[k] += z[i].argmax() == row[i + k + 1]
        for name, (load, losses) in routing.items():
            loads[name] = loads.get(name, 0) + np.squeeze(np.array(load), 0 if name.startswith("mtp") else ())
            balance += sum(losses)
    total = (ce[0] + mtp_weight * ce[1:].sum() / depths) / count[0] + alpha * balance / len(rows)
    return total, loads, (ce, count, hits, balance)
