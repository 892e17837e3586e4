"""A scheme of one's own in five lines: what it costs, how it is written down, and what happens to a wrong one."""

from kvdsl import Recent, Scheme, SchemeError, Sinks, Store, Uniform, bits, per_channel, per_token

# Keys in 3 bits, one scale a channel for 64 tokens; values in 4 bits, one scale a token.
mine = Scheme(
    keys=Store(Uniform(3), scale=per_channel(tokens=64)),
    values=Store(Uniform(4), scale=per_token()),
    sinks=Sinks(4),  # the first four tokens stay exact
    recent=Recent(64),  # and so do the newest 64
)


def main() -> None:
    print(mine, "\n")
    for side in ("keys", "values"):
        print(f"{side:7s}{bits(mine, head_dim=128).formula(side)}")
    print(f"of 4096 tokens, window and sinks counted: {bits(mine, tokens=4096).mean:.3f} bits an element\n")

    print(mine.to_toml())
    assert Scheme.from_toml(mine.to_toml()) == mine

    harder = mine.with_(**{"keys.code.bits": 2, "values.scale.range": "absmax"})
    print("a variant:", harder, "\n")

    try:
        mine.with_(**{"keys.scale.block.tokens": 48})
    except SchemeError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
