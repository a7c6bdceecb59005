"""What is on disk or behind an address, read strictly, and what turns it into batches.

Shards: ``sample`` what a sample is; ``tar`` the strict reader; ``manifest`` the index beside a shard; ``remote`` http;
``shards`` reading; ``writing`` writing.
Annotation files: ``records`` JSON, read and checked; ``annotated`` examples and the folders of their pictures;
``vqa``, ``nlvr2``, ``captions`` the official files of each.
Both: ``loader`` order and batches; ``masking``, ``transforms``, ``text`` what a task makes of a sample.
"""
