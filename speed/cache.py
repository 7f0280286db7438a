"""The key/value cache: room for the tokens to come, in the type that the model computes in.

A transformer keeps the keys and values of every token that it has read, layer by layer, and a new token looks at them. In a rollout
this cache is the largest thing in memory after the weights. So there is never more than one, it is filled in one copy, and it is kept
in bfloat16 where the model computes in it.

    RoomyLayer      a layer with room in which new tokens are written in place
    static_layer    a layer of fixed size, for `--static_cache`
    PolicyCache     all layers, of whichever kind

Scoring and updates write nothing. They read the prompts' cache, each response that of its prompt, and gradients may flow back into it.

    in_type         keys and values of a layer in the type that attention computes in
    read_by         the prompts' cache as rows of responses see it
"""

import copy

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer


class RoomyLayer(DynamicLayer):
    """A prompt's cache layer, repeated `copies` times, with room for the tokens to come, which are written in place.

    A DynamicLayer copies the whole cache each time it grows. This one is for passes without gradient: writing in place would break a
    backward pass.
    """

    def __init__(self, layer, copies, tokens):
        super().__init__()
        self.__dict__.update(vars(layer))
        self.room = []
        for prompt in (layer.keys, layer.values):  # (Q, heads, length, head size)
            Q, heads, length, size = prompt.shape
            room = prompt.new_empty(Q, copies, heads, length + tokens, size)
            room[:, :, :, :length] = prompt[:, None]
            self.room.append(room.flatten(0, 1))
        self.keys, self.values = (room[:, :, :length] for room in self.room)  # (B, heads, length, head size)

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values of new tokens, (B, heads, n, head size); returns those of all tokens so far."""
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        for buffer, new in zip(self.room, (key_states, value_states)):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)
        return self.keys, self.values


def static_layer(layer, copies, length):
    """The same as a layer of fixed size, which compiled generation needs: room for `length` tokens, prompt included, or for a window."""
    sliding = type(layer) is DynamicSlidingWindowLayer
    static = StaticSlidingWindowLayer(length, layer.sliding_window) if sliding else StaticLayer(length)
    seen, kept, size = layer.get_seq_length(), layer.keys.shape[2], static.max_cache_len
    start = 0 if seen < size else size - kept  # a full window rolls by one token when a new one comes
    pairs = layer.keys, layer.values  # (Q, heads, kept, head size)
    static.lazy_initialization(*(prompt[:, :, :0].repeat_interleave(copies, dim=0) for prompt in pairs))  # zeros: garbage may be NaN
    for room, prompt in zip((static.keys, static.values), pairs):
        room.unflatten(0, (len(prompt), copies))[:, :, :, start : start + kept] = prompt[:, None]
    static.cumulative_length.fill_(seen)
    if sliding:
        static.cumulative_length_int = seen
    return static


class PolicyCache(Cache):
    """The keys and values of a pass without gradient, kept in `dtype`, or as they come where it is None.

    Under autocast rotated keys come in float32, and a layer of transformers then keeps the values in float32, too. Attention casts
    both to bfloat16 again for every new token. Cast once, when they come, they are the same numbers in half the memory.

    It is not a DynamicCache, because transformers compiles generation for any other cache whose layers all have a fixed size.
    """

    def __init__(self, layers, dtype=None):
        super().__init__(layers=layers)
        self.dtype = dtype

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values of new tokens, (B, heads, n, head size), to a layer; returns those of all tokens so far."""
        if self.dtype is not None:
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        return super().update(key_states, value_states, *args, **kwargs)


def in_type(layer, dtype):
    """Cast a layer's keys and values. One that is not of a known kind, because it keeps something else, is refused."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise NotImplementedError(f"a cache of {type(layer).__name__} cannot be repeated")
    layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)


def read_by(cache, owner):
    """A prompts' cache as rows of responses see it: row i has the keys and values of prompt owner[i], and its own. owner: (n,).

    Nothing is written to the cache, so it serves any number of passes. Repeated keys and values are alive only while their layer runs.
    """

    def seen(layer):
        def update(keys, values, *args, **kwargs):
            """The layer's own update, on a copy of it. keys, values: of new tokens, (n, heads, T, head size)."""
            grown = copy.copy(layer)
            # index_select and not [owner]: the same rows, and a backward pass that adds whole rows, many times faster on a CPU
            grown.keys, grown.values = layer.keys.index_select(0, owner), layer.values.index_select(0, owner)
            return grown.update(keys.to(layer.keys.dtype), values.to(layer.values.dtype), *args, **kwargs)

        view = copy.copy(layer)
        view.update = update
        return view

    view = copy.copy(cache)
    view.layers = [seen(layer) for layer in cache.layers]
    return view
