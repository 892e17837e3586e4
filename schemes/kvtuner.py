"""KVTuner: KIVI with a pair of key and value bits for each layer, found for one model (arXiv 2502.04420).

A model of other layers has another map: search for it.  This one is of SmolLM2-135M-Instruct, 30 layers, for 4 bits
with metadata, on the first 1024 tokens of a novel: `from kvdsl.models.text import botchan`, written to botchan.txt.
"""

from kvdsl.scheme import Recent, Scheme, Store, Uniform, per_channel, per_token


def kivi(keys: int, values: int) -> Scheme:
    """KIVI with so many bits."""
    return Scheme(
        keys=Store(Uniform(keys), scale=per_channel(tokens=32)),
        values=Store(Uniform(values), scale=per_token(channels=32)),
        recent=Recent(128),
    )


# kvdsl search kivi2 --model smollm2 --text botchan.txt --bits 4 --out kvtuner.toml
kvtuner = kivi(4, 2).with_(
    layers={(0, 6, 29): kivi(2, 2), (17, 18, 23): kivi(4, 4)},
    source="arXiv 2502.04420; the table is what `kvdsl search` finds for SmolLM2-135M at 4 bits",
)
