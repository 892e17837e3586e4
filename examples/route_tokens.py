"""Mixed precision by token: a router of one's own, and one that goes by attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvdsl import bits, labels, roundtrip
from kvdsl.scheme import Recent, Router, Saliency, Scheme, Store, Tier, Uniform, per_token


@dataclass(frozen=True, repr=False)
class EveryKth(Router):
    """Every k-th token goes to the first tier, all others to the second."""

    k: int = 4

    def labels(self, position: Tensor, prompt: int) -> Tensor:
        return (position % self.k != 0).long()


store = Store(Uniform(), scale=per_token(channels=32))
spaced = Scheme(both=store, recent=Recent(16), tiers=(Tier(8), Tier(2)), router=EveryKth(4))
salient = Scheme(both=store, recent=Recent(16), tiers=(Tier(8, top=0.25), Tier(2)), router=Saliency(every=32))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 128, 64, generator=generator) for heads in (4, 2, 2))
    for name, scheme in (("every fourth token", spaced), ("a quarter, by attention", salient)):
        where = labels(scheme, q, k, v)  # -1: exact, else the tier
        keys, _ = roundtrip(scheme, k, v, labels=where)
        print(f"{name}: {scheme!r}")
        print(f"  {bits(scheme, head_dim=64).mean:.3f} bits an element, where each token stands included")
        for tier in (-1, 0, 1):
            here = where == tier
            error = (keys - k)[here].square().mean().item()
            print(f"  {'exact' if tier < 0 else f'tier {tier}'}: {int(here.sum())} tokens of heads, mse {error:.5f}")


if __name__ == "__main__":
    main()
