"""Shards, their order, and what turns samples into tensors.

``sample`` what a sample is; ``tar`` the strict reader; ``manifest`` the index beside a shard; ``remote`` http;
``shards`` reading; ``writing`` writing; ``loader`` order and batches; ``masking``, ``transforms``, ``text``
what a task makes of a sample.
"""
