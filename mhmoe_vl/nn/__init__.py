"""Layers: tensors in, tensors out.

Shape suffixes of local names, inside forward passes only:

====== ============================================
``B``  batch
``N``  tokens
``D``  width of a token (``dim``)
``H``  attention heads
``S``  sub-tokens per token (``num_subtokens``)
``d``  width of a sub-token, D / S
``T``  routed rows (padding removed)
``E``  experts (``num_experts``)
``K``  choices per row (``top_k``)
``F``  inner width of an expert (``hidden_dim``)
====== ============================================
"""
