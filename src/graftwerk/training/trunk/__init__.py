"""The trunk once: hidden states that enter the lowest adapted layer, computed once per row and then kept.

`plan` decides whether, `rows` says where each row's states lie, `store` keeps them, `cache` computes and serves them.
"""
