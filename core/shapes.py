"""The legend of shape suffixes used in names and docstrings throughout the package.

    B  batch                 Q  kept queries (rows)          A  supervised tokens
    T  sequence              V  visual keys (columns)        K  kept logits
    G  layer groups          L  layers                       D  width (hidden size)
    H  heads                 C  vocabulary

`attention_GQV` is thus an array of (layer groups, kept queries, visual keys).
"""
