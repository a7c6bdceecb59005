"""The sparse layers once more, as slow nested loops over tokens, sub-tokens and choices.

It shares no code with the package: it reads a layer's parameters by name and follows the formulas of the papers.
Autograd differentiates the plain arithmetic, so its gradients are a reference too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Result:
    outputs: list
    balance_loss: torch.Tensor
    z_loss: torch.Tensor
    experts: list = field(default_factory=list)
    kept: list = field(default_factory=list)


def parameters_of(layer):
    """Float64 copies of all parameters by name, ready to take gradients."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in layer.named_parameters()}


def activate(name, x):
    if name == "relu":
        return x * (x > 0)
    if name == "swiglu":
        return x / (1 + torch.exp(-x))
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def feed_forward(p, prefix, x, activation):
    """One vector through fc1, (fc_gate,) fc2 of an nn.Linear feed-forward network."""

    def linear(name, v):
        y = p[f"{prefix}{name}.weight"] @ v
        return y + p[f"{prefix}{name}.bias"] if f"{prefix}{name}.bias" in p else y

    if activation == "swiglu":
        return linear("fc2", activate(activation, linear("fc_gate", x)) * linear("fc1", x))
    return linear("fc2", activate(activation, linear("fc1", x)))


def expert(p, number, x, activation):
    def linear(name, v):
        y = v @ p[f"routed.experts.{name}_weight"][number]
        return y + p[f"routed.experts.{name}_bias"][number] if f"routed.experts.{name}_bias" in p else y

    if activation == "swiglu":
        return linear("fc2", activate(activation, linear("fc_gate", x)) * linear("fc1", x))
    return linear("fc2", activate(activation, linear("fc1", x)))


def router_logits(p, x, router):
    """Logits, and logits for the balance loss, of one row."""
    if router.get("kind", "linear") == "linear":
        logits = p["routed.router.weight"] @ x
        return logits, logits
    u = p["routed.router.proj.weight"] @ x
    if router.get("normalize_rows", True):
        u = u / u.norm()
    start = router.get("initial_temperature") or (0.3 if router.get("gate", "softmax") == "softmax" else 0.07)
    cosines = torch.stack([u @ e / e.norm() for e in p["routed.router.embedding"]])
    if "routed.router.log_temperature" in p:
        return cosines / p["routed.router.log_temperature"].exp(), cosines / start
    return cosines / start, cosines / start


def projection(p, name, layers, x):
    for number in range(layers):
        key = name if layers == 1 else f"{name}.{2 * number}"
        x = x * (x > 0) if number else x  # as ReLU, no gradient at 0
        x = p[f"{key}.weight"] @ x + p[f"{key}.bias"]
    return x


def conv_head(p, x, padding, kernel, stride):
    """Positions of one sample (N, D) and whether each is padding."""
    N, left = len(x), (kernel - stride) // 2
    positions, padded = [], []
    for start in range(0, N, stride):
        y = p["head_proj.bias"]
        for tap in range(kernel):
            n = start - left + tap
            if 0 <= n < N and not padding[n]:
                y = y + p["head_proj.weight"][:, :, tap] @ x[n]
        positions.append(y)
        padded.append(all(padding[n] for n in range(start, min(start + stride, N))))
    return positions, padded


def conv_merge(p, positions, N, kernel, stride):
    left = (kernel - stride) // 2
    tokens = [p["merge_proj.bias"] for _ in range(N)]
    for j, y in enumerate(positions):
        for tap in range(kernel):
            n = j * stride - left + tap
            if 0 <= n < N:
                tokens[n] = tokens[n] + y @ p["merge_proj.weight"][:, :, tap]
    return tokens


def sparse_layer(
    p,
    streams,
    paddings,
    *,
    top_k,
    num_subtokens=None,
    activation="gelu",
    router=None,
    normalize_gates=True,
    head_layers=1,
    merge_layers=1,
    subtoken_residual=False,
    conv_kernel=None,
    conv_stride=1,
    num_shared_experts=0,
    balance_share="first",
    balance_per_modality=False,
    capacity=None,
    choices=None,
    **_sizes,
):
    """``streams`` (B, N, D) float64 with bool ``paddings`` or None; ``num_subtokens`` None is MoE over whole tokens.

    ``choices`` (T lists of K experts) replaces the router's own choice; ``capacity`` is in rows per expert.
    """
    router = router or {}
    whole_tokens = num_subtokens is None
    S = 1 if whole_tokens else num_subtokens
    heads, rows = [], []
    for number, (x, padding) in enumerate(zip(streams, paddings, strict=True)):
        B, N, D = x.shape
        padding = torch.zeros(B, N, dtype=torch.bool) if padding is None else padding
        samples = []
        for b in range(B):
            if conv_kernel is not None:
                tokens, padded = conv_head(p, x[b], padding[b], conv_kernel, conv_stride)
            else:
                layers = 0 if whole_tokens else head_layers
                tokens, padded = [projection(p, "head_proj", layers, x[b, n]) for n in range(N)], list(padding[b])
            samples.append([[t[s * (D // S) : (s + 1) * (D // S)] for s in range(S)] for t in tokens])
            rows += [(number, b, n, s, samples[b][n][s]) for n in range(len(tokens)) if not padded[n] for s in range(S)]
        heads.append(samples)

    result = Result([], torch.zeros(()), torch.zeros(()))
    gates, softmaxes, z_terms = [], [], []
    for t, (*_, x) in enumerate(rows):
        logits, balance_logits = router_logits(p, x, router)
        softmax = router.get("gate", "softmax") == "softmax"
        every = logits.exp() / logits.exp().sum() if softmax else 1 / (1 + (-logits).exp())
        order = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))
        chosen = order[:top_k] if choices is None else [int(e) for e in choices[t]]
        total = sum(every[e] for e in chosen) if normalize_gates and top_k > 1 else 1
        gates.append([every[e] / total for e in chosen])
        result.experts.append(chosen)
        softmaxes.append(balance_logits.exp() / balance_logits.exp().sum())
        z_terms.append(logits.exp().sum().log() ** 2)

    taken, result.kept = {}, [[True] * top_k for _ in rows]
    for k in range(top_k):
        for t in range(len(rows)):
            e = result.experts[t][k]
            result.kept[t][k] = capacity is None or taken.get(e, 0) < capacity
            taken[e] = taken.get(e, 0) + 1

    mixed = [[[[torch.zeros_like(s) for s in t] for t in sample] for sample in stream] for stream in heads]
    for t, (number, b, n, s, x) in enumerate(rows):
        y = x if subtoken_residual else torch.zeros_like(x)
        for k, e in enumerate(result.experts[t]):
            if result.kept[t][k]:
                y = y + gates[t][k] * expert(p, e, x, activation)
        mixed[number][b][n][s] = y

    for number, x in enumerate(streams):
        B, N, D = x.shape
        output = x.new_zeros(B, N, D)
        for b in range(B):
            tokens = [torch.cat(pieces) for pieces in mixed[number][b]]
            if conv_kernel is not None:
                tokens = conv_merge(p, tokens, N, conv_kernel, conv_stride)
            elif not whole_tokens:
                tokens = [projection(p, "merge_proj", merge_layers, t) for t in tokens]
            for n in range(N):
                y = tokens[n]
                for shared in range(num_shared_experts):
                    y = y + feed_forward(p, f"shared_experts.{shared}.", x[b, n], activation)
                output[b, n] = y
        result.outputs.append(output)

    if rows:
        groups = sorted({r[0] for r in rows}) if balance_per_modality else [None]
        losses = []
        for group in groups:
            members = [t for t, r in enumerate(rows) if group is None or r[0] == group]
            losses.append(balance(members, result.experts, softmaxes, 1 if balance_share == "first" else top_k))
        result.balance_loss = sum(losses) / len(losses)
        result.z_loss = sum(z_terms) / len(z_terms)
    return result


def balance(members, experts, softmaxes, counted):
    E = len(softmaxes[0])
    loss = 0
    for e in range(E):
        share = sum(experts[t][:counted].count(e) for t in members) / (len(members) * counted)
        loss = loss + E * share * sum(softmaxes[t][e] for t in members) / len(members)
    return loss
