"""Mixture of experts: a router, routed experts, shared experts.

The router keeps no state in `forward`: it returns what it chose and what it scored (`Routing`), and whoever needs loads,
balance losses or recorded routes makes them from that. So nothing is counted twice under recomputation, the sampler can
record routes and the trainer can replay them. Sources: DeepSeek-V3 (arXiv 2412.19437, 2.1.2), V2 (2405.04434),
loss-free balancing (2408.15664), and the released code for both; Qwen3-MoE for plain softmax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jevons.kernels.experts import experts
from jevons.model.config import ModelConfig
from jevons.model.layer import MLP


class Routing(NamedTuple):
    """What one router did: the global layer index, the experts chosen (T, K), their weights (T, K), all scores (T, E) in fp32."""

    layer: int
    experts_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor

    def loads_E(self) -> Tensor:
        """How many tokens each expert got."""
        return torch.bincount(self.experts_TK.flatten(), minlength=self.scores_TE.shape[1])


class Router(nn.Module):
    """Scores in fp32, a choice of K experts (within the best groups), and their weights.

    sigmoid + noaux_tc (V3): choose by score plus correction bias, a group counts as the sum of its two best; weigh by the
    plain score. softmax + greedy or group_limited_greedy (V2, Qwen3): no bias, a group counts as its best.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.sigmoid = config.scoring_func == "sigmoid"
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.grouped = config.topk_method != "greedy" and self.top_groups < self.groups
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor | None
        bias_E = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_correction_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, x_TD: Tensor, forced_TK: Tensor | None = None) -> Routing:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.sigmoid() if self.sigmoid else logits_TE.softmax(-1)
        experts_TK = self.choose(scores_TE.detach()) if forced_TK is None else forced_TK
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(self.layer, experts_TK, weights_TK * self.factor, scores_TE)

    def choose(self, scores_TE: Tensor) -> Tensor:
        """(T, E) scores -> (T, K) expert ids."""
        if self.e_score_correction_bias is not None:
            scores_TE = scores_TE + self.e_score_correction_bias
        if self.grouped:
            grouped_TGX = scores_TE.unflatten(-1, (self.groups, -1))
            best_TG = grouped_TGX.amax(-1) if self.e_score_correction_bias is None else grouped_TGX.topk(2, dim=-1).values.sum(-1)
            kept = best_TG.topk(self.top_groups, dim=-1).indices
            # -inf, not 0: with negative biases a masked expert at 0 would beat every real one
            drop_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, kept, False)
            scores_TE = grouped_TGX.masked_fill(drop_TG[..., None], -math.inf).flatten(1)
        return scores_TE.topk(self.top_k, dim=-1).indices


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj (E, 2F, D) with the gate first, down_proj (E, D, F)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, F_, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))  # torch.empty, because Tensor(...) ignores torch.device("meta")
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return experts(x_TD, routing.experts_TK, routing.weights_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus, for DeepSeek, shared experts: one ungated SwiGLU of n_shared times the expert width, always on."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_TD: Tensor, forced_TK: Tensor | None = None) -> tuple[Tensor, Routing]:
        routing = self.gate(x_TD, forced_TK)
        out_TD = self.experts(x_TD, routing)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, routing
