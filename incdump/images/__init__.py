"""CRIU's image files: codecs, the directory they are in, and the chain of parents it stands on.

Functions called ``encode_...`` return a whole file's bytes, magics included; those called ``decode_...`` take that, and
the path it came from for their errors. Everything here blocks and is meant for worker threads.
"""
