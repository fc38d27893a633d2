"""Image data sets as ArrayRecord shards: made once, read at random access.

`inputs` says what there is to convert, `from_folder`, `from_webdataset` and
`from_parquet` read it, `shards` writes one piece of it, `making` all pieces in
parallel; `manifest` describes the folder that comes out and `record` what lies
in a shard. `data.sources.arrayrecord` trains from it.
"""
