"""What makes a step fast and small, and changes no number: a first reading can skip this folder.

    paths    the three ways to the hidden states of responses: plain, on the prompt's cache, packed; and which rows run together
    cache    the key/value cache of passes without gradient
"""
