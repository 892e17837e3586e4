"""A scheme of a user's: a scale for all heads of a token."""

from kvdsl.scheme import ALL, Scheme, Store, Uniform, per_token

mine = Scheme(both=Store(Uniform(4), scale=per_token(heads=ALL)))
